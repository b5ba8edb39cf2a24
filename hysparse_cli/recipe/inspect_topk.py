"""Options of ``hysparse inspect-topk``."""

from hysparse_cli.recipe.fields import Device, Dtype, FilePath, Positive, Section, Seed


class InspectOptions(Section):
    """``hysparse inspect-topk``: ``prompt`` or ``data`` is what the model reads, or made-up text.

    A dense model is looked at under the layout that the section ``convert`` plans for it.
    ``needle`` is a part of the text (its first place counts), and ``answer`` its end (added where
    the text does not end so): did the layers that predict the answer, or the next token, get the
    needle's blocks?

    Files to write: ``html`` is a page, ``png`` a picture, ``npz`` the arrays; ``lists`` the
    selected blocks of every token, for ``bench kernels``.
    """

    prompt: str | None = None
    data: FilePath | None = None
    text_field: str = "text"
    max_tokens: Positive = 2048
    needle: str | None = None
    answer: str | None = None
    html: FilePath | None = None
    png: FilePath | None = None
    npz: FilePath | None = None
    lists: FilePath | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
