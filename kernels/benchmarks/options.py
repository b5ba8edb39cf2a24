"""Holds the options of ``make bench-kernels``, and reads them from a command line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

OPS = ("full", "block-sparse", "window", "layer", "decode")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Options:
    """What to measure.

    context: tokens of whole sequences. heads: pairs of query and KV heads; decode takes the first.
    lists: a file of ``hysparse inspect-topk --lists``; lists are made up where it is None.
    measure_ms: about how long each measurement takes.
    """

    context: Sequence[int] = (8192, 32768)
    ops: Sequence[str] = OPS
    heads: Sequence[tuple[int, int]] = ((32, 8), (64, 4))
    head_dim: int = 128
    block_size: int = 64
    top_k_tokens: int = 1024
    window_tokens: int = 128
    decode_batch: Sequence[int] = (1, 16, 64)
    decode_context: int = 32768
    lists: Path | None = None
    measure_ms: int = 100
    dtype: str = "bfloat16"
    device: str = "cuda"
    seed: int = 0

    @property
    def top_k_blocks(self) -> int:
        """Blocks selected for each query."""
        return self.top_k_tokens // self.block_size

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"lists": self.lists and str(self.lists)}


def parse(words: Sequence[str]) -> tuple[Options, Path | None, bool]:
    """The options, the folder for results or None, and whether to print JSON.

    Raises: SystemExit with 2 where ``words`` make no sense, after one line on stderr.
    """
    default, parser = Options(), _Parser("bench-kernels", description=__doc__)
    add = parser.add_argument
    add("--context", type=_tokens, default=default.context, help="such as 8k,32k")
    add("--ops", type=_ops, default=default.ops, help=f"of {','.join(OPS)}")
    add("--heads", type=_heads, default=default.heads, help="query and KV heads: 32/8,64/4")
    for name in ("head_dim", "block_size", "top_k_tokens", "window_tokens", "measure_ms"):
        add(f"--{name.replace('_', '-')}", type=_token, default=getattr(default, name))
    add("--decode-batch", type=_tokens, default=default.decode_batch, help="such as 1,16")
    add("--decode-context", type=_token, default=default.decode_context)
    add("--lists", type=Path, help="a file of hysparse inspect-topk --lists; else made up")
    add("--dtype", choices=DTYPES, default=default.dtype)
    add("--device", choices=("cuda", "cpu"), default=default.device)
    add("--seed", type=int, default=default.seed)
    add("--output", type=Path, help="a folder for JSON and Markdown, written after each row")
    add("--json", action="store_true", help="print JSON, not Markdown")
    given = vars(parser.parse_args(words))
    output, as_json = given.pop("output"), given.pop("json")
    options = Options(**given)
    if options.top_k_tokens % options.block_size:
        parser.error(
            f"block size {options.block_size} does not divide top-k tokens {options.top_k_tokens}"
        )
    return options, output, as_json


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists all options\n")


def _token(word: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,8})(k?)", word)
    if not found:
        raise argparse.ArgumentTypeError(f"{word!r} is no number such as 512 or 8k")
    return int(found[1]) * (1024 if found[2] else 1)


def _tokens(words: str) -> list[int]:
    return [_token(word) for word in words.split(",")]


def _ops(words: str) -> list[str]:
    for word in words.split(","):
        if word not in OPS:
            raise argparse.ArgumentTypeError(f"{word!r} is unknown; known: {', '.join(OPS)}")
    return words.split(",")


def _heads(words: str) -> list[tuple[int, int]]:
    pairs = []
    for word in words.split(","):
        found = re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", word)
        if not found:
            raise argparse.ArgumentTypeError(f"{word!r} are no query and KV heads such as 32/8")
        heads, kv_heads = int(found[1]), int(found[2])
        if heads % kv_heads:
            raise argparse.ArgumentTypeError(f"{word}: {kv_heads} does not divide {heads}")
        pairs.append((heads, kv_heads))
    return pairs
