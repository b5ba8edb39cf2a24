"""Wrong headers of shards, and indexes that lie."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hysparse_cli.files.checkpoint import INDEX, SINGLE
from tests.long.case import DEEP, ESCAPES, LONG, Case, Damage


def with_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Rewrite the first shard's header; the tensors stay as they are."""

    def apply(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0]
        content = shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def _first(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(v for k, v in header.items() if k != "__metadata__")
    return found


def _put(field: str, value: Any) -> Damage:
    return with_header(lambda header: _first(header).__setitem__(field, value))


def _renamed(name: str) -> Damage:
    def change(header: dict[str, Any]) -> None:
        old = next(key for key in header if key != "__metadata__")
        header[name] = header.pop(old)

    return with_header(change)


def _added(name: str, entry: Any) -> Damage:
    return with_header(lambda header: header.__setitem__(name, entry))


def header_cases() -> Iterator[Case]:
    dtypes = ("F64", "F16", "BF16", "I32", "I64", "U32", "BOOL", "F8_E4M3", "F4", "C64", "X")
    odd: tuple[Any, ...] = (None, 1, 1.5, -1, True, "x", [], {}, [None], [-1], [1.5], [2**63])
    for dtype in (*dtypes, *odd):
        yield Case("header", f"dtype {dtype}", _put("dtype", dtype))
    shapes = (
        [64],
        [64, 32, 1],
        [32, 64],
        [2**40, 2**40],
        [0],
        [1] * 10_000,
        [True, 32],
        ["64", 32],
    )
    for shape in (*shapes, *odd):
        yield Case("header", f"shape {str(shape)[:30]}", _put("shape", shape))
    spans = ([0, 0], [1, 8193], [8192, 0], [0, 2**62], [-8, 8184], [0, 2**64], [0], [0, 1, 2])
    for span in (*spans, ["0", "8192"], *odd):
        yield Case("header", f"offsets {span}", _put("data_offsets", span))
    names = (
        "",
        "model.layers.999999999.x",
        LONG,
        ESCAPES,
        "model.layers.1.self_attn.hysparse.sinks",
    )
    for name in (*names, "__metadata__", "a\x00b", "\ud800", "model.norm.weight"):
        yield Case("header", f"renamed {name[:40]!r}", _renamed(name))
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for name in names:
        yield Case("header", f"added {name[:40]!r}", _added(name, entry))
    for metadata in (None, 1, [], {"format": 1}, {"format": "tf"}, {"a": LONG}, {"a": {}}):
        yield Case("header", f"metadata {str(metadata)[:30]}", _added("__metadata__", metadata))
    fields = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for field in fields:
        yield Case(
            "header", f"no {field}", with_header(lambda h, f=field: _first(h).pop(f) and None)
        )
    yield Case("header", "another field", _put("more", {"a": [1]}))
    yield Case("header", "a name twice", with_header(_twice))
    yield Case("header", "deep", with_header(lambda header: DEEP.encode()))
    yield Case("header", "not UTF-8", with_header(lambda header: b'{"\xff\xfe": 1}'))
    yield Case("header", "a list", with_header(lambda header: b"[]"))
    yield Case("header", "empty", with_header(lambda header: b"{}"))
    yield Case("header", "padded by tabs", with_header(lambda h: json.dumps(h).encode() + b"\t"))
    for size in (15 << 20, 100_000_000, 100_000_001):
        yield Case("header", f"{size} spaces", with_header(_padded(size)))
    yield Case(
        "header", "15 MB of lists", with_header(lambda h: b'{"a":[' + b"[{}]," * 3_000_000 + b"1]}")
    )
    yield Case("header", "100,000 tensors", with_header(_many(100_000)))
    yield Case("header", "100,000 layers", with_header(_many(100_000, "model.layers.{}.x")))
    for length in (0, 1, 7, 2**31, 2**63, 2**64 - 1):
        yield Case("header", f"length {length}", lambda f, n=length: _set_length(f, n))
    for dtype in ("int64", "int32", "uint8", "bool", "float64", "float8_e4m3fn", "complex64"):
        for tensor in ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
            yield Case("dtype", f"{tensor} {dtype}", _recast(tensor, dtype))


def _twice(header: dict[str, Any]) -> bytes:
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps({name: header[name]})[1:-1]}}}").encode()


def _padded(size: int) -> Callable[[dict[str, Any]], bytes]:
    return lambda header: json.dumps(header).encode() + b" " * size


def _many(count: int, pattern: str = "t{}") -> Callable[[dict[str, Any]], None]:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return lambda header: header.update({pattern.format(i): entry for i in range(count)})


def _set_length(folder: Path, length: int) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(length.to_bytes(8, "little") + shard.read_bytes()[8:])


def _recast(tensor: str, dtype: str) -> Damage:
    def apply(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]
        values = load_file(shard)
        save_file(values | {tensor: values[tensor].to(getattr(torch, dtype))}, shard)

    return apply


def with_index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def apply(folder: Path) -> None:
        path = folder / INDEX
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def index_cases() -> Iterator[Case]:
    norm = "model.norm.weight"
    places: tuple[Any, ...] = (
        *("../x.safetensors", "/etc/passwd", "", ".", "..", "a\x00b", "\ud800", "x/../y", ESCAPES),
        *("n" * 255, "n" * 5000, "config.json", "tokenizer.json", None, 1, [], {}, True),
    )
    for place in places:
        yield Case("index", f"in {str(place)[:30]!r}", _placed({norm: place}))
    for name in (LONG, ESCAPES, "", "model.layers.999999999.x"):
        yield Case("index", f"names {name[:30]!r}", _placed({name: "model.safetensors"}))
    for value in (None, [], {}, 1, "x", [[]], {"a": {}}):
        yield Case("index", f"map {value}", with_index(lambda c, v=value: c.update(weight_map=v)))
        yield Case(
            "index", f"metadata {value}", with_index(lambda c, v=value: c.update(metadata=v))
        )
    many = {f"t{i}": f"model-{i:07d}.safetensors" for i in range(200_000)}
    yield Case("index", "200,000 shards", _placed(many))
    yield Case(
        "index", "1,000,000 shards", _placed({f"t{i}": f"m{i}.safetensors" for i in range(10**6)})
    )
    yield Case(
        "index",
        "200,000 tensors",
        _placed({f"t{i}": "model-00001-of-00005.safetensors" for i in range(200_000)}),
    )
    yield Case("index", "one shard twice", _hard_link)
    yield Case("index", "model.safetensors a directory", lambda f: (f / SINGLE).mkdir())
    yield Case("index", "model.safetensors empty", lambda f: (f / SINGLE).write_bytes(b""))
    yield Case("index", "model.safetensors a pipe", lambda f: os.mkfifo(f / SINGLE))


def _placed(places: dict[str, Any]) -> Damage:
    return with_index(lambda content: content["weight_map"].update(places))


def _hard_link(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.link(shard, folder / "again.safetensors")
    _placed({"model.extra": "again.safetensors"})(folder)
