"""Files that are cut, empty, deep, huge, folders, pipes or links; adapters; odd names."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.long.case import DEEP, ESCAPES, Case


def file_cases(names: list[str]) -> Iterator[Case]:
    for name in names:
        for what, damage in _FILE_FAULTS.items():
            yield Case("file", f"{name} {what}", lambda f, n=name, d=damage: d(f / n))


def _replaced(content: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return change


def _sparse_file(path: Path) -> None:
    os.truncate(path, 500 << 20)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(target: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


_FILE_FAULTS: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: path.unlink(),
    "empty": _replaced(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by one": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "garbage": _replaced(bytes(range(256)) * 40),
    "zeros": _replaced(bytes(4096)),
    "500 MB": _sparse_file,
    "deep": _replaced(DEEP.encode()),
    "deep objects": _replaced(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "30 MB of lists": _replaced(b"[" + b"[{}]," * 6_000_000 + b"1]"),
    "a list": _replaced(b"[]"),
    "an object": _replaced(b"{}"),
    "a number": _replaced(b"1" * 5000),
    "null": _replaced(b"null"),
    "byte-order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "UTF-16": lambda path: path.write_bytes("\ufeff{}".encode("utf-16")),
    "a directory": _directory,
    "a pipe": _pipe,
    "a link to itself": lambda path: _linked(path.name)(path),
    "a link to nothing": _linked("nothing"),
    "a link to a device": _linked("/dev/zero"),
    "a link to a folder": _linked("."),
}


def side_cases() -> Iterator[Case]:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": ESCAPES}
    faults = {"adapter": json.dumps(adapter), "no adapter": "{", "deep": DEEP, "a list": "[]"}
    for name, text in faults.items():
        yield Case("adapter", name, lambda f, t=text: (f / "adapter_config.json").write_text(t))
        yield Case("adapter", f"{name} only", lambda f, t=text: _adapter_only(f, t))
    for name in (
        "vocab.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "merges.txt",
        "x.json",
    ):
        for what in (
            "garbage",
            "deep",
            "500 MB",
            "a list",
            "a number",
            "30 MB of lists",
            "a directory",
        ):
            yield Case("side", f"{name} {what}", lambda f, n=name, w=what: _beside(f / n, w))
    for name in ("n" * 255, "\x1b[31m.json", "a\nb.json", "\udcff.json", "`|<script>.txt"):
        yield Case("side", f"named {name[:20]!r}", lambda f, n=name: (f / n).write_text("{}"))
    yield Case(
        "side", "tokenizer.model garbage", lambda f: (f / "tokenizer.model").write_bytes(b"\x0a")
    )
    yield Case(
        "side", "templates a file", lambda f: (f / "additional_chat_templates").write_text("")
    )


def _adapter_only(folder: Path, text: str) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text(text)


def _beside(path: Path, what: str) -> None:
    path.write_bytes(b"{}")
    _FILE_FAULTS[what](path)


def folder_cases() -> Iterator[Case]:
    def gone(folder: Path) -> None:
        shutil.rmtree(folder)

    def is_file(folder: Path) -> None:
        gone(folder)
        folder.write_text("x")

    def is_loop(folder: Path) -> None:
        gone(folder)
        folder.symlink_to(folder.name)

    def is_pipe(folder: Path) -> None:
        gone(folder)
        os.mkfifo(folder)

    for name, damage in {
        "gone": gone,
        "a file": is_file,
        "a loop": is_loop,
        "a pipe": is_pipe,
    }.items():
        yield Case("folder", name, damage)
    yield Case("folder", "empty", lambda f: [path.unlink() for path in f.iterdir()])
