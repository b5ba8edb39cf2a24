"""Finds what an installation can run: versions, GPUs, the backend of each op, optional packages."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hysparse_cli.printable import single_line

if TYPE_CHECKING:
    from rich.console import Group

    from hysparse_cli.tables import Table

SCHEMA = "hysparse.doctor/1"
VERSIONS = ("hysparse", "torch", "triton", "transformers")
# the optional packages, the extra of hysparse that installs each, and what needs it
OPTIONAL = (
    ("peft", "lora", "finetune.lora_rank"),
    ("datasets", "data", "finetune --data hub:NAME"),
    ("pyarrow", "data", "parquet files, and files ending in .zst"),
    ("lm_eval", "lm-eval", "eval --lm-eval"),
    ("tensorboard", "logging", "finetune --log-to tensorboard"),
    ("wandb", "logging", "finetune --log-to wandb"),
)
# an op, and the tokens of a key block where it has such
OPS = (
    ("full_attention", 64),
    ("block_sparse_attention", 64),
    ("sliding_window_attention", None),
    ("sparse_layer_attention", 64),
)
INSTALL = "install with"  # the column of commands, which are not folded
PROBE = "bfloat16, head dimension 128, blocks of 64"


@dataclass(frozen=True)
class OpBackend:
    """backend: what would run the op; None where nothing does. refusals: backend -> its reason."""

    op: str
    backend: str | None
    refusals: dict[str, str]


@dataclass(frozen=True)
class OptionalPackage:
    """version: None where it is not installed. extra: the extra of hysparse that installs it."""

    name: str
    version: str | None
    extra: str
    serves: str


@dataclass(frozen=True)
class Report:
    """What was found. gpus: a line for each, or one that says why there is none."""

    versions: dict[str, str | None]
    gpus: list[str]
    forced_backend: str | None
    backends: list[OpBackend]
    optional: list[OptionalPackage]

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def table(self) -> "Group":
        from rich.console import Group

        return Group(self._machine(), self._attention(), self._packages())

    def _machine(self) -> "Table":
        table = _table("installed", "", "")
        for name, found in self.versions.items():
            table.add_row(name, found or "missing")
        for number, gpu in enumerate(self.gpus):
            table.add_row("" if number else "GPU", gpu)
        return table

    def _attention(self) -> "Table":
        table = _table("attention", "op", "run by", "refused by")
        table.caption = f"asked for {PROBE}"
        if self.forced_backend:
            table.caption += f"; HYSPARSE_BACKEND={self.forced_backend} is set"
        for row in self.backends:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in row.refusals.items())
            table.add_row(row.op, row.backend or "nothing", reasons)
        return table

    def _packages(self) -> "Table":
        table = _table("optional packages", "package", "version", "serves", INSTALL)
        for package in self.optional:
            command = "" if package.version else f"pip install 'hysparse[{package.extra}]'"
            table.add_row(package.name, package.version or "missing", package.serves, command)
        return table


def examine() -> Report:
    """Look at the installation; a torch that can't be imported is said in place of the GPUs.

    Raises: OutOfResources where a GPU is full.
    """
    versions = {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS}
    try:
        from hysparse_cli.devices import out_of_memory_is
    except (ImportError, OSError) as error:
        gpus, backends = [f"torch can't be imported: {single_line(error)}"], []
    else:
        gpus = list(_gpus())
        with out_of_memory_is("the GPU has no memory left for a small call: end what fills it"):
            backends = [_backend(op, block_size) for op, block_size in OPS]
    return Report(
        versions=versions,
        gpus=gpus,
        forced_backend=os.environ.get("HYSPARSE_BACKEND"),
        backends=backends,
        optional=[OptionalPackage(n, _version(n), extra, serves) for n, extra, serves in OPTIONAL],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> Iterator[str]:
    import torch

    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else None
    if not torch.cuda.is_available():
        yield f"none is found; {built or 'torch is built without CUDA'}"
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}; {built}"


def _backend(op: str, block_size: int | None) -> OpBackend:
    """What ``hysparse_kernels`` would run a small call with, and the reasons of the others."""
    import torch

    from hysparse_kernels.backends import BACKENDS, Call, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 1, 8, 128, dtype=torch.bfloat16, device=device)
    kv = torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16, device=device)
    call = Call(op, q, kv, kv, block_size)
    refusals = {b.name: reason for b in BACKENDS if (reason := b.refuses(call)) is not None}
    try:
        return OpBackend(op, choose(call).backend.name, refusals)
    except ValueError as error:  # of HYSPARSE_BACKEND
        return OpBackend(op, None, refusals | {"HYSPARSE_BACKEND": single_line(error)})


def _table(title: str, *headers: str) -> "Table":
    from hysparse_cli.tables import Table

    table = Table(title=title, title_justify="left", show_header=any(headers))
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header == INSTALL)
    return table
