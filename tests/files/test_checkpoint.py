"""Reading headers: what is accepted, and that damage of every kind is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hysparse_cli.errors import UnreadableInput, UnsupportedModel
from hysparse_cli.files.checkpoint import INDEX, SINGLE, open_checkpoint, side_files


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_headers_say_where_every_tensor_lies(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert len(checkpoint.shards) > 2
    for shard in checkpoint.shards:
        values = load_file(shard.path)
        assert set(values) == {tensor.name for tensor in shard.tensors}
        content = shard.path.read_bytes()
        for tensor in shard.tensors:
            stored = content[tensor.start : tensor.start + tensor.size]
            assert stored == values[tensor.name].numpy().tobytes()
            assert tensor.shape == tuple(values[tensor.name].shape) and tensor.dtype == "F32"
    assert checkpoint.size == sum(
        path.stat().st_size for path in checkpoint.folder.glob("*.safetensors")
    )


def test_a_single_file_wins_over_an_index_as_in_transformers(tiny_checkpoint: Path) -> None:
    save_file({"alone": torch.zeros(2)}, tiny_checkpoint / SINGLE)
    assert list(open_checkpoint(tiny_checkpoint).tensors) == ["alone"]


def test_side_files_are_those_that_belong(tiny_checkpoint: Path) -> None:
    for name in ("tool.py", "LICENSE", "pytorch_model.bin", ".gitattributes", "notes.pdf"):
        (tiny_checkpoint / name).write_text("x")
    (tiny_checkpoint / "additional_chat_templates").mkdir()
    (tiny_checkpoint / "additional_chat_templates" / "rag.jinja").write_text("x")
    names = {str(path) for path in side_files(tiny_checkpoint)}
    assert names == {
        "LICENSE",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert Path("tool.py") in side_files(tiny_checkpoint, with_code=True)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard(keep: int, tiny_checkpoint: Path) -> None:
    shard = first_shard(tiny_checkpoint)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UnreadableInput, match=f"{shard.name} is truncated"):
        open_checkpoint(tiny_checkpoint)


@pytest.mark.parametrize(
    ("start", "garbage"),
    [(8, b"[[[["), (0, b"\xff" * 8), (-1, None)],
    ids=["no JSON", "absurd length", "excess bytes"],
)
def test_a_corrupt_shard(start: int, garbage: bytes | None, tiny_checkpoint: Path) -> None:
    shard = first_shard(tiny_checkpoint)
    content = bytearray(shard.read_bytes())
    if garbage is None:
        content += b"more"
    else:
        content[start : start + len(garbage)] = garbage
    shard.write_bytes(content)
    with pytest.raises(UnreadableInput, match=f"{shard.name} is corrupt"):
        open_checkpoint(tiny_checkpoint)


def test_a_header_whose_shape_and_size_differ_is_corrupt(tiny_checkpoint: Path) -> None:
    shard = first_shard(tiny_checkpoint)
    content = shard.read_bytes()
    assert b'"shape":[32]' in content or b"[64,32]" in content
    shard.write_bytes(content.replace(b"[64,32]", b"[64,33]").replace(b"[32]", b"[33]"))
    with pytest.raises(UnreadableInput, match="is corrupt"):
        open_checkpoint(tiny_checkpoint)


def test_a_tensor_in_two_shards(tiny_checkpoint: Path) -> None:
    shards = sorted(tiny_checkpoint.glob("*.safetensors"))
    name, values = next(iter(load_file(shards[0]).items()))
    save_file(load_file(shards[1]) | {name: values}, shards[1])
    with pytest.raises(UnreadableInput, match=f"{name} is in both"):
        open_checkpoint(tiny_checkpoint)


def test_an_index_that_lies(tiny_checkpoint: Path) -> None:
    index = tiny_checkpoint / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = first_shard(tiny_checkpoint).name
    index.write_text(json.dumps(content))
    with pytest.raises(UnreadableInput, match=r"places model\.extra in"):
        open_checkpoint(tiny_checkpoint)
    content["weight_map"]["model.extra"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UnreadableInput, match="which is not there"):
        open_checkpoint(tiny_checkpoint)
    index.write_text("{}")
    with pytest.raises(UnreadableInput, match="no weight_map"):
        open_checkpoint(tiny_checkpoint)
    index.write_text("{")
    with pytest.raises(UnreadableInput, match="not valid JSON"):
        open_checkpoint(tiny_checkpoint)


def test_pickled_and_quantised_weights_are_refused(tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tiny_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="quant_method 'mxfp4'"):
        open_checkpoint(tiny_checkpoint)
    (tiny_checkpoint / "config.json").write_text("{}")
    for path in (*tiny_checkpoint.glob("*.safetensors"), tiny_checkpoint / INDEX):
        path.unlink()
    with pytest.raises(UnreadableInput, match=f"neither {SINGLE} nor"):
        open_checkpoint(tiny_checkpoint)
    (tiny_checkpoint / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        open_checkpoint(tiny_checkpoint)
