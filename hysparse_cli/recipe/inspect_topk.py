"""Options of ``hysparse inspect-topk``."""

from typing import Annotated

from hysparse_cli.recipe.fields import (
    TEXT_FILE,
    Device,
    Dtype,
    FilePath,
    Flag,
    Section,
    Seed,
    TextField,
    Tokens,
    TrustRemoteCode,
)


class InspectOptions(Section):
    """``hysparse inspect-topk``: ``prompt`` or ``data`` is what the model reads, or made-up text.

    A dense model is looked at under the layout that the section ``convert`` plans for it. With a
    needle, the layers that predict ``answer``, or the next token, are asked for its blocks.
    """

    prompt: Annotated[str | None, Flag("The text to read.")] = None
    data: Annotated[
        FilePath | None, Flag(f"{TEXT_FILE}, to read the first document of.", "made up")
    ] = None
    text_field: TextField = "text"
    max_tokens: Annotated[Tokens, Flag("Read at most so much of it.")] = 2048
    needle: Annotated[str | None, Flag("Part of the text: who selects and reads its blocks?")] = (
        None
    )
    answer: Annotated[str | None, Flag("What the text should end in, knowing the needle.")] = None
    html: Annotated[FilePath | None, Flag("A page to write.")] = None
    png: Annotated[FilePath | None, Flag("A picture to write.")] = None
    npz: Annotated[FilePath | None, Flag("A file to write all arrays to.")] = None
    lists: Annotated[
        FilePath | None, Flag("A safetensors file of the lists, for bench --lists.")
    ] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    seed: Seed = 0
