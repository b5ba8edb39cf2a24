"""What users get wrong: the exact exit code, one line on stderr, nothing left behind."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hysparse_cli.errors import OutOfResources
from hysparse_cli.files.checkpoint import INDEX
from hysparse_cli.files.output import staged
from tests.conftest import Hysparse

Damage = Callable[[Path], object]
NORM = "model.norm.weight"


def set_config(**values: object) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_norm(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        shard = folder / index["weight_map"][NORM]
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)
        if NORM not in tensors:
            del index["weight_map"][NORM]
            (folder / INDEX).write_text(json.dumps(index))

    return apply


def rotation(**values: object) -> Damage:
    return set_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4} | values)


half_rotation = rotation(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)


def written(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


DAMAGE: dict[str, tuple[Damage, int, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), 7, "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), 7, "not valid JSON"),
    "no model_type": (set_config(model_type=None), 7, "no model_type"),
    "bad config value": (set_config(num_hidden_layers="four"), 7, "num_hidden_layers: "),
    "impossible sizes": (set_config(num_attention_heads=0), 7, "config.json"),
    "unknown family": (set_config(model_type="mamba"), 4, "supported: apertus"),
    "refused family": (set_config(model_type="gemma3"), 4, "rotary embedding differs by layer"),
    "own code": (set_config(auto_map={"AutoConfig": "a.B"}), 7, "--trust-remote-code"),
    "already converted": (set_config(model_type="hysparse"), 4, "already a HySparse checkpoint"),
    "quantised": (set_config(quantization_config={"quant_method": "fp8"}), 4, "'fp8'"),
    "quantised by nothing": (set_config(quantization_config={}), 4, "quantization_config"),
    "a billion layers": (set_config(num_hidden_layers=10**9), 7, "num_hidden_layers: "),
    "layers without tensors": (set_config(num_hidden_layers=99), 7, "tensors of 4 layers"),
    "layers of a flag": (set_config(num_hidden_layers=True), 7, "num_hidden_layers: "),
    "a negative window": (set_config(sliding_window=-1), 7, "sliding_window: "),
    "no positions": (set_config(max_position_embeddings=0), 7, "max_position_embeddings: "),
    "a dtype of 3": (set_config(torch_dtype=3), 7, "dtype: "),
    "a text for a flag": (set_config(use_cache="yes"), 7, "use_cache: "),
    "not a number": (set_config(rms_norm_eps=float("nan")), 7, "rms_norm_eps is nan"),
    "40 digits": (set_config(bos_token_id=10**40), 7, "bos_token_id is 1000"),
    "deep values": (
        set_config(task={"a": [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]}),
        7,
        "too deeply",
    ),
    "a token too many": (set_config(pad_token_id=64), 7, "pad_token_id 64 is outside"),
    "uneven heads": (set_config(num_key_value_heads=3), 7, "does not divide"),
    "an unknown activation": (set_config(hidden_act="silu2"), 7, "silu2"),
    "too few layer types": (set_config(layer_types=["full_attention"]), 7, "layer_types"),
    "an odd rotation": (rotation(rope_type="x"), 7, "config.json"),
    "an endless rotation": (rotation(rope_type="linear", factor=1e-300), 7, "no finite numbers"),
    "half a rotation": (half_rotation, 7, "no model that can be run"),
    "a method's name": (set_config(to_dict=1), 7, "to_dict is no setting"),
    "a kernel of the hub": (set_config(attn_implementation="a/b"), 4, "attn_implementation 'a/b'"),
    "an adapter beside": (
        written("adapter_config.json", '{"base_model_name_or_path": "some/base"}'),
        7,
        "an adapter (adapter_config.json) of some/base: merge it first",
    ),
    "a pipe as config": (lambda f: piped(f / "config.json"), 7, "has no config.json"),
    "a pipe as shard": (lambda f: piped(last_shard(f)), 7, "which is not there"),
    "config a loop": (lambda f: looped(f / "config.json"), 7, "has no config.json"),
    "missing shard": (lambda f: last_shard(f).unlink(), 7, "which is not there"),
    "truncated shard": (lambda f: os.truncate(last_shard(f), 2000), 7, "is truncated"),
    "corrupt header": (lambda f: last_shard(f).write_bytes(b"\x09" * 99), 7, "is corrupt"),
    "missing tensor": (change_norm(lambda t: t.pop(NORM)), 7, f"tensor {NORM} is missing"),
    "wrong shape": (
        change_norm(lambda t: t.update({NORM: torch.ones(33)})),
        7,
        f"tensor {NORM} has shape [33], but config.json makes it [32]",
    ),
    "integers": (
        change_norm(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int32)})),
        7,
        f"tensor {NORM} is I32, but the model has floats there",
    ),
    "our names": (
        change_norm(lambda t: t.update({"model.layers.0.self_attn.hysparse.sinks": torch.ones(4)})),
        7,
        "has the name of one that HySparse adds",
    ),
    "float8": (
        change_norm(lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        4,
        f"tensor {NORM} is F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_or_unsupported_input(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    damage, exit_code, reason = DAMAGE[name]
    damage(tiny_checkpoint)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out")
    assert run.exit_code == exit_code, run.stderr
    assert reason in run.stderr
    assert run.stdout == "" and run.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


WRONG_OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "pattern length": (("--pattern", "FSS"), "3 letters, but the model has 4 layers"),
    "pattern start": (("--pattern", "SFSF"), "layer 0 must be F"),
    "pattern letters": (("--pattern", "FXSF"), "'X'"),
    "no full layer": (("--pattern", "SSSS"), "layer 0 must be F"),
    "full layers": (("--full-layers", "0,9"), "full_layers has 9"),
    "full layers text": (
        ("--full-layers", "0;1"),
        "full_layers.0: not a whole number such as 64 (got '0;1')",
    ),
    "ratio": (("--ratio", "3"), "not of the form 1:N"),
    "two placements": (("--ratio", "1:1", "--pattern", "FSSF"), "give one"),
    "sparse layers in full": (("--layout", "full", "--pattern", "FSSF"), "layout full"),
    "block size": (("--block-size", "48"), "block_size 48 does not divide"),
    "layout": (("--layout", "dense"), "convert.layout"),
    "dtype": (("--dtype", "int8"), "convert.dtype"),
    "window": (("--window-tokens", "1"), "convert.window_tokens"),
    "shard size": (("--max-shard-size", "big"), "convert.max_shard_size"),
    "unknown field": (("--set", "convert.blok=1"), "convert.blok: unknown field; known: "),
    "40 digits": (("--max-position-embeddings", "9" * 40), "convert.max_position_embeddings"),
    "40 digits of tokens": (("--fit", "1GB", "--context", "9" * 40), "not one length"),
    "5,000 digits of bytes": (("--max-shard-size", "9" * 5000), "convert.max_shard_size"),
    "5,000 digits of a ratio": (("--ratio", "1:" + "9" * 5000), "not of the form 1:N"),
    "5,000 digits of a pair": (("--swap-attention", "1:" + "9" * 5000), "swap_attention"),
    "no seed": (("--set", "convert.seed=-1"), "convert.seed"),
    "no base": (("--set", "convert.rope_theta=.inf"), "convert.rope_theta"),
    "NUL in a name": (("--set", r'convert.calibration="a\0b"'), "NUL"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_that_can_not_be_carried_out(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, name: str
) -> None:
    flags, reason = WRONG_OPTIONS[name]
    run = hysparse("convert", tiny_original, tmp_path / "out", *flags)
    assert (run.exit_code, run.stdout) == (3, "") and reason in run.stderr
    assert run.stderr.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model", ["./nowhere", "/no/such/folder", "a/b/c", "~nobody/x", "a--b/c..d", "n" * 5000]
)
def test_a_model_that_is_not_there(hysparse: Hysparse, tmp_path: Path, model: str) -> None:
    run = hysparse("convert", model, tmp_path / "out")
    assert run.exit_code == 7 and run.stderr.count("\n") == 1 and len(run.stderr) < 1000
    assert "no such folder" in run.stderr or "File name too long" in run.stderr


def test_a_hub_id_without_a_network(
    hysparse: Hysparse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = hysparse("convert", "nobody/nothing-here", tmp_path / "out", "--revision", "v1")
    assert run.exit_code == 7 and "the hub can't be reached" in run.stderr
    assert run.stderr.count("\n") == 1


def test_places_that_out_may_not_be(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("x")
    file.write_text("x")
    inside, around = tiny_checkpoint / "out", tmp_path
    refused = [tiny_checkpoint, inside, around, full, file]
    for out in refused:
        for flags in ((), ("--overwrite",)):
            run = hysparse("convert", tiny_checkpoint, out, *flags)
            assert run.exit_code == 3 and run.stderr.count("\n") == 1, run
            assert "OUT" in run.stderr and str(out) in run.stderr
    assert (full / "precious").exists() and (tiny_checkpoint / "config.json").exists()


def test_overwrite_replaces_a_checkpoint(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert hysparse("convert", tiny_checkpoint, out).exit_code == 0
    assert hysparse("convert", tiny_checkpoint, out).exit_code == 3
    run = hysparse("convert", tiny_checkpoint, out, "--overwrite", "--pattern", "FFSF")
    assert run.exit_code == 0
    assert json.loads((out / "config.json").read_text())["hysparse"]["pattern"] == "FFSF"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_own_code_is_kept_where_it_is_trusted(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    set_config(auto_map={"AutoConfig": "own.Config"})(tiny_checkpoint)
    (tiny_checkpoint / "own.py").write_text("raise SystemExit('never run')\n")
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out", "--trust-remote-code")
    assert run.exit_code == 0 and (tmp_path / "out" / "own.py").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_known_to_be_too_small(
    hysparse: Hysparse, tiny_original: Path, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 100_000)
    run = hysparse("convert", tiny_original, small_disk / "deep" / "out")
    assert run.exit_code == 5 and "disk full" in run.stderr and run.stderr.count("\n") == 1
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_disk_that_fills_up_while_writing(small_disk: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(OutOfResources, match="disk full"), staged(out, overwrite=False) as partial:
        (partial / "big").write_bytes(b"x" * 300_000)
    with pytest.raises(OutOfResources, match="disk full"), staged(out, overwrite=False) as partial:
        save_file({"big": torch.zeros(100_000)}, partial / "big.safetensors")
    assert not any(small_disk.iterdir())
