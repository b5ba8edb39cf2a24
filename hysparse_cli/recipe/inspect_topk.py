"""Options of ``hysparse inspect-topk``."""

from hysparse_cli.recipe.fields import Device, Dtype, Positive, Section


class InspectOptions(Section):
    """``hysparse inspect-topk``: one of ``prompt`` or ``data`` is what the model reads.

    ``lists`` is a file to write: the selected blocks of every token, for ``bench kernels``.
    """

    prompt: str | None = None
    data: str | None = None
    text_field: str = "text"
    max_tokens: Positive = 2048
    lists: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0
