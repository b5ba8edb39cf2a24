"""Holds the options of ``make bench-kernels``, and reads them from a command line."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

OPS = ("full", "block-sparse", "window", "layer", "decode")


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
    parser = _Parser(
        "bench-kernels",
        description="Times the attention ops beside other people's on one GPU, and checks them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, read, what in _FLAGS:
        default = getattr(Options, name)
        flag, metavar = f"--{name.replace('_', '-')}", name.rpartition("_")[2].upper()
        parser.add_argument(flag, type=read, default=default, metavar=metavar, help=what)
    parser.add_argument("--output", type=Path, help="a folder for JSON and Markdown, row by row")
    parser.add_argument("--json", action="store_true", help="print JSON, not Markdown")
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
    return [_one_of(*OPS)(word) for word in words.split(",")]


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


def _one_of(*known: str) -> Callable[[str], str]:
    def read(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is unknown; known: {', '.join(known)}")
        return word

    return read


_FLAGS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("context", _tokens, "tokens of whole sequences, such as 8k,32k"),
    ("ops", _ops, "some of them"),
    ("heads", _heads, "query and KV heads, such as 32/8,64/4; decode takes the first"),
    ("head_dim", _token, "of queries, keys and values"),
    ("block_size", _token, "tokens in a block"),
    ("top_k_tokens", _token, "that each query selects"),
    ("window_tokens", _token, "of the sliding window"),
    ("decode_batch", _tokens, "sequences at once, such as 1,16"),
    ("decode_context", _token, "tokens in the cache"),
    ("lists", Path, "a file of hysparse inspect-topk --lists; None makes lists up"),
    ("measure_ms", _token, "about how long each measurement takes"),
    ("dtype", _one_of("bfloat16", "float16", "float32"), "of inputs"),
    ("device", _one_of("cuda", "cpu"), "cpu tries the reference out"),
    ("seed", int, "of random inputs"),
)
