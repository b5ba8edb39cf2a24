"""Malformed checkpoints by the hundred: each a kind, a name and what is done to a good one."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hysparse_cli.checkpoint import INDEX, SINGLE

Damage = Callable[[Path], object]
DEEP = "[" * 200_000 + "]" * 200_000
LONG = "n" * 100_000
ESCAPES = "\x1b[31mred\u202eder\n\ttab"
RAW = {
    "deep": DEEP,
    "4,400 digits": "9" * 4400,
    "40 digits": "9" * 40,
    "lone surrogate": '"\\ud800"',
}


class Case(NamedTuple):
    kind: str
    name: str
    damage: Damage


WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "0": 0,
    "-1": -1,
    "-2": -2,
    "1": 1,
    "3": 3,
    "1.5": 1.5,
    "1e9": 10**9,
    "2**63": 2**63,
    "1e308": 1e308,
    "NaN": math.nan,
    "Infinity": math.inf,
    "empty text": "",
    "text": "yes",
    "long text": LONG,
    "escapes": ESCAPES,
    "empty list": [],
    "list": [1, 2],
    "list of text": ["x"],
    "long list": ["full_attention"] * 1_000_000,
    "empty object": {},
    "object": {"a": 1},
    "object of objects": {"a": {"b": [None]}},
}
# beside the fields that the good one has
MORE_FIELDS = (
    *("rope_scaling", "rope_theta", "torch_dtype", "quantization_config", "num_labels", "id2label"),
    *("label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("_attn_implementation", "attn_implementation", "experts_implementation", "auto_map"),
    *("num_experts", "per_layer_config", "transformers_weights", "tie_word_embeddings"),
    *("gradient_checkpointing", "is_encoder_decoder", "_name_or_path", "mlp_bias", "clip_qkv"),
    *("to_dict", "get_text_config", "attribute_map", "base_model_tp_plan", "is_heterogeneous"),
    *("mlp_layer_types", "use_cache", "hysparse", "base_model_type", "n_layer", "is_decoder"),
)
VALUES: dict[str, list[Any]] = {
    "model_type": ["qwen3\n", "QWEN3", "llama", "qwen3_moe", "gpt2", "../qwen3", "кит", ESCAPES],
    "_attn_implementation": ["flash_attention_2", "kernels-community/flash-attn", "eager", "sdpa"],
    "attn_implementation": [
        "kernels-community/flash-attn:f",
        "flash_attention_3",
        "flex_attention",
    ],
    "experts_implementation": ["kernels-community/megablocks", "grouped_mm", "none"],
    "rope_parameters": [
        {"rope_type": kind, "rope_theta": 1e4, **more}
        for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "x", 3, None)
        for more in (
            *({}, {"factor": 0}, {"factor": -1}, {"factor": "x"}, {"factor": 1e308}),
            {"factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [1.0] * 100_000},
            {"factor": 2.0, "partial_rotary_factor": 1e9},
            {"factor": 2.0, "partial_rotary_factor": 0.5},
            {"factor": 4.0, "low_freq_factor": 0, "high_freq_factor": 0},
            {"factor": 4.0, "original_max_position_embeddings": 0},
            {"factor": 4.0, "original_max_position_embeddings": 10**12},
        )
    ]
    + [{"rope_theta": x} for x in (0, -1, "x", 1e300, None, [1e4])]
    + [{"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}],
    "rope_scaling": [{"type": "linear", "factor": f} for f in (0, 1, 2.0, "x", None)]
    + [{"type": "mrope", "mrope_section": [1, 2]}, {"type": ["yarn"]}, {"rope_type": {}}],
    "layer_types": [
        ["full_attention"] * 3,
        ["full_attention"] * 5,
        ["sliding_attention"] * 4,
        ["x"] * 4,
        ["linear_attention"] * 4,
        ["full_attention", None, 1, {}],
    ],
    "hidden_act": ["silu2", "gelu", "__class__", "silu\n"],
    "architectures": [["Qwen3ForSequenceClassification"], "Qwen3ForCausalLM", ["x" * 9999], [None]],
    "dtype": ["float8_e4m3fn", "int8", "float16", "float64", "nn", "torch.float32", "auto"],
    "pad_token_id": [63, 64, 10**6],
    "eos_token_id": [64, [1, 2, 10**6], [], [[1]]],
    "num_labels": [10_000_000],
    "id2label": [{"x": "y"}, {str(i): "y" for i in range(100_000)}],
    "problem_type": ["regression", "single_label_classification"],
    "tie_word_embeddings": [False],
    "quantization_config": [{"quant_method": "fp8"}, {"load_in_4bit": True}],
    "initializer_range": [1e6],
    "head_dim": [7, 8, 16],
    "num_key_value_heads": [2, 4],
    "rms_norm_eps": [0, 1, 1e-30],
    "sliding_window": [1, 2, 4096],
    "max_position_embeddings": [1, 2**31 - 1, 2**31, 10**12],
}


def set_config(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def raw_config(field: str, raw: str) -> Damage:
    """Put JSON that Python's writer would not write."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | {field: "HERE"}
        path.write_text(json.dumps(content).replace('"HERE"', raw))

    return change


def config_cases(config: dict[str, Any]) -> Iterator[Case]:
    for field in dict.fromkeys((*config, *MORE_FIELDS)):
        for name, value in WRONG.items():
            yield Case("config", f"{field} {name}", set_config(**{field: value}))
        for i, value in enumerate(VALUES.get(field, ())):
            yield Case("config", f"{field} value {i}", set_config(**{field: value}))
        for name, raw in RAW.items():
            yield Case("config", f"{field} {name}", raw_config(field, raw))
        if field in config:
            yield Case("config", f"{field} absent", lambda f, k=field: _without(f, k))


def _without(folder: Path, field: str) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))


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


def set_json(file: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tokenizer_cases(config: dict[str, Any], tokenizer: dict[str, Any]) -> Iterator[Case]:
    values = {k: v for k, v in WRONG.items() if k not in ("long list", "1e308", "3", "false")}
    more = (
        "chat_template",
        "auto_map",
        "added_tokens_decoder",
        "extra_special_tokens",
        "padding_side",
    )
    for field in dict.fromkeys((*config, *more)):
        for name, value in values.items():
            damage = set_json("tokenizer_config.json", **{field: value})
            yield Case("tokenizer_config", f"{field} {name}", damage)
    for name in ("NoSuchTokenizer", "LlamaTokenizer", "Qwen2TokenizerFast", "builtins.print", "os"):
        damage = set_json("tokenizer_config.json", tokenizer_class=name)
        yield Case("tokenizer_config", f"tokenizer_class {name}", damage)
    code = {"AutoTokenizer": ["own.Tokenizer", None]}
    yield Case("tokenizer_config", "own code", set_json("tokenizer_config.json", auto_map=code))
    some = ("null", "true", "-1", "1e9", "text", "list", "object", "object of objects")
    for field in tokenizer:
        for name in some:
            damage = set_json("tokenizer.json", **{field: WRONG[name]})
            yield Case("tokenizer", f"{field} {name}", damage)
    for name in some:
        for field in ("type", "vocab", "unk_token", "merges"):
            model = tokenizer["model"] | {field: WRONG[name]}
            yield Case(
                "tokenizer", f"model.{field} {name}", set_json("tokenizer.json", model=model)
            )
    vocab = {f"w{i}": i for i in range(300)}
    larger = tokenizer["model"] | {"vocab": tokenizer["model"]["vocab"] | vocab}
    yield Case("tokenizer", "more tokens than embeddings", set_json("tokenizer.json", model=larger))
    holes = tokenizer["model"] | {"vocab": {"<unk>": 2, "a": 10**9, "b": -1}}
    yield Case("tokenizer", "absurd ids", set_json("tokenizer.json", model=holes))
    yield Case("tokenizer", "none at all", lambda f: [p.unlink() for p in f.glob("*tok*.json")])


def generation_cases() -> Iterator[Case]:
    fields = ("max_length", "eos_token_id", "pad_token_id", "temperature", "do_sample", "num_beams")
    more = ("cache_implementation", "transformers_version", "max_new_tokens", "compile_config")
    values = ("null", "true", "-1", "1e9", "NaN", "text", "list", "object of objects", "long text")
    for field in (*fields, *more, "stop_strings", "watermarking_config", "to_dict"):
        for name in values:
            damage = set_json("generation_config.json", **{field: WRONG[name]})
            yield Case("generation_config", f"{field} {name}", damage)


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


def all_cases(folder: Path) -> list[Case]:
    """Every case there is for a checkpoint like the one in ``folder``."""
    read = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("config", "tokenizer")}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = sorted(path.name for path in folder.iterdir() if path.name != "chat_template.jinja")
    return [
        *config_cases(read["config"]),
        *file_cases(names),
        *header_cases(),
        *index_cases(),
        *tokenizer_cases(settings, read["tokenizer"]),
        *generation_cases(),
        *side_cases(),
        *folder_cases(),
    ]
