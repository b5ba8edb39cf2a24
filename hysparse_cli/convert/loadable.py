"""Checks that what is about to be written can be loaded: on its small files, before the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.files.checkpoint import has_tokenizer
from hysparse_cli.files.reading import read_json

GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Loadable:
    """``num_tokens`` of the tokenizer, None where none was loaded; ``num_embeddings``: what the
    model has for them."""

    num_tokens: int | None
    num_embeddings: int

    @property
    def warnings(self) -> list[str]:
        if self.num_tokens is None or self.num_tokens <= self.num_embeddings:
            return []
        return [
            f"the tokenizer has {self.num_tokens} tokens and the model embeds "
            f"{self.num_embeddings}: text that needs the ids from {self.num_embeddings} on can't "
            "be read"
        ]


def check_loadable(folder: Path, source: Path, *, with_code: bool) -> Loadable:
    """Load config, generation config and tokenizer of a converted checkpoint.

    Args:
        folder: it, without weights. source: the dense one, for messages.
        with_code: code beside the tokenizer is trusted, and not run here.
    Raises: UnreadableInput where transformers can't load one of them.
    """
    # transformers takes seconds to import
    from transformers import AutoConfig, GenerationConfig

    from hysparse_cli.convert.shapes import building, unallocated

    with building(f"{source / 'config.json'} could not be loaded again"):
        model = unallocated(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if (folder / GENERATION).is_file():
        if not isinstance(read_json(folder / GENERATION), dict):
            raise UnreadableInput(f"{source / GENERATION} holds no JSON object: remove it")
        with building(f"{source / GENERATION} can't be loaded: mend or remove it"):
            GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = _tokenizer(folder, source, with_code=with_code)
    return Loadable(
        num_tokens=None if tokenizer is None else len(tokenizer),
        num_embeddings=model.get_input_embeddings().weight.shape[0],
    )


def _tokenizer(folder: Path, source: Path, *, with_code: bool) -> Any:
    if not has_tokenizer(folder):
        return None
    if (folder / _TOKENIZER).is_file():
        settings = read_json(folder / _TOKENIZER)
        if not isinstance(settings, dict):
            raise UnreadableInput(f"{source / _TOKENIZER} holds no JSON object")
        if "auto_map" in settings and with_code:
            return None
    from hysparse_cli.model.loading import load_tokenizer

    try:
        return load_tokenizer(folder)
    except UnreadableInput as error:
        raise UnreadableInput(str(error).replace(str(folder), str(source))) from None
