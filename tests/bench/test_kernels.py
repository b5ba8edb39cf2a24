"""hysparse bench kernels: its command line, tables, peers, lists, and what a wrong kernel does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hysparse_cli.bench.kernels import lists
from hysparse_cli.bench.kernels.clock import Latency
from hysparse_cli.bench.kernels.run import cases_of
from hysparse_cli.bench.kernels.targets import (
    CUDNN,
    FLA_NSA,
    TARGETS,
    XUNHAO_NSA,
    Target,
    targets_of,
)
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.recipe import KernelBenchOptions
from hysparse_kernels import backends, reference
from hysparse_kernels.backends import Backend
from tests.conftest import Hysparse

TINY = """
bench_kernels:
  context: [40]
  heads: ["4/2"]
  head_dim: 8
  block_size: 8
  top_k_tokens: 16
  window_tokens: 8
  decode_batch: [2]
  decode_context: 33
  device: cpu
"""


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny_lists(tmp_path: Path) -> Path:
    """Two layers' lists of one text of 24 tokens: every block up to the query's own, latest two."""
    own = torch.arange(24) // 8
    both = torch.stack([own - 1, own], dim=-1)
    both[own == 0] = torch.tensor([0, -1])
    layer = both[:, None].expand(24, 2, 2).int().contiguous()
    path = tmp_path / "lists.safetensors"
    save_file({"layer.0": layer, "layer.4": layer.clone()}, path, metadata={"block_size": "8"})
    return path


def wrong(monkeypatch: pytest.MonkeyPatch, op: str, spoil: Callable[[Any], Any]) -> None:
    """Put a backend in front whose ``op`` gives the reference's result, spoilt."""

    def spoilt(*args: Any, **options: Any) -> Any:
        return spoil(getattr(reference, op)(*args, **options))

    module = SimpleNamespace(**{**vars(reference), op: spoilt})
    backend = Backend("spoilt", module, lambda call: None)  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "BACKENDS", (backend, *backends.BACKENDS))


def test_every_op_is_timed_and_checked_in_both_directions(
    hysparse: Hysparse, tiny_recipe: Path
) -> None:
    run = hysparse("bench", "kernels", "--recipe", tiny_recipe, "--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["schema"] == "hysparse.bench-kernels/1" and result["failures"] == []
    assert result["environment"]["device"] == "cpu"
    assert [ceiling["name"] for ceiling in result["ceilings"]] == ["copy", "matmul"]
    names = [row["op"] for row in result["rows"]]
    ops = ("full + TopK", "block-sparse", "block-sparse", "window + sinks", "sparse layer")
    for op in ops:
        for direction in ("forward", "backward"):
            assert any(name.startswith(f"{op} {direction}") for name in names)
    assert names[-2:] == ["decode, full + TopK", "decode, sparse layer"]
    for row in result["rows"]:
        assert row["error"] is None and row["backend"].startswith("reference")
        assert row["p10_latency_ms"] <= row["median_latency_ms"] <= row["p90_latency_ms"]
        assert row["flops"] > 0 and row["moved_bytes"] > 0 and row["fraction_of_ceiling"] > 0
        assert row["errors"] and all(error["lawful"] for error in row["errors"])
    (layer,) = (row for row in result["rows"] if row["op"].startswith("sparse layer backward"))
    checked = [error["what"] for error in layer["errors"][::2]]
    assert checked == ["dq", "dk", "dv", "dwindow_k", "dwindow_v", "dgate_logits"]
    checked = [error["what"] for error in result["rows"][0]["errors"]]
    assert checked == ["out", "out, rms", "selected scores"]


def test_the_table_shows_rows_and_names_missing_peers(
    hysparse: Hysparse, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setitem(sys.modules, "fla", None)  # as where it is not installed
    out = tmp_path / "results" / "new"
    args = ("--recipe", tiny_recipe, "--ops", "block-sparse,window", "--output", out)
    run = hysparse("bench", "kernels", *args)
    assert run.exit_code == 0, run.stderr
    written = (out / "kernels.md").read_text()
    for text in (run.stdout, written):
        assert "block-sparse forward, random lists" in text and "decode" not in text.split("ms:")[0]
        assert "synthetic lists: made up" in text and "kernels: reference" in text
        assert "fla NSA (fla" in text and "XunhaoLai NSA (native_sparse_attention" in text
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 6 and len({line.count(" | ") for line in rows}) == 1
    assert json.loads((out / "kernels.json").read_text())["schema"] == "hysparse.bench-kernels/1"


@pytest.mark.parametrize(
    ("op", "ops", "spoil", "what"),
    [
        ("full_attention", "full", lambda x: x._replace(out=x.out + 0.1), "in out"),
        ("full_attention", "full", lambda x: x._replace(block_idx=x.block_idx * 0), "selected"),
        ("full_attention", "full", lambda x: x._replace(out=x.out * torch.nan), "nan in out"),
        ("block_sparse_attention", "block-sparse", lambda x: x._replace(out=2 * x.out), "in dv"),
        ("sparse_layer_attention", "decode", lambda x: -x, "decode, sparse layer"),
    ],
)
def test_a_wrong_kernel_is_a_failed_gate(
    hysparse: Hysparse,
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    ops: str,
    spoil: Callable[[Any], Any],
    what: str,
) -> None:
    wrong(monkeypatch, op, spoil)
    run = hysparse("bench", "kernels", "--recipe", tiny_recipe, "--ops", ops)
    assert run.exit_code == 6, run.stderr
    assert what in run.stderr and run.stderr.count("\n") == 1
    assert "WRONG" in run.stdout and "spoilt" in run.stdout


def test_a_kernel_that_raises_fails_and_one_without_memory_does_not(
    hysparse: Hysparse, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(result: Any) -> Any:
        raise error

    wrong(monkeypatch, "sliding_window_attention", spoil)
    args = ("bench", "kernels", "--recipe", tiny_recipe, "--ops", "window", "--json")
    error: Exception = ValueError("no such thing. And more.")
    run = hysparse(*args)
    assert run.exit_code == 6 and "raised ValueError: no such thing" in run.stderr
    assert json.loads(run.stdout)["rows"][0]["error"] == "ValueError: no such thing"
    error = torch.OutOfMemoryError("CUDA out of memory")
    run = hysparse(*args)
    assert run.exit_code == 0, run.stderr
    assert {row["error"] for row in json.loads(run.stdout)["rows"]} == {"out of memory"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(hysparse: Hysparse) -> None:
    run = hysparse("bench", "kernels")
    assert run.exit_code == 5 and "--device cpu" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["kernels", "--batch", "2"], 3, "takes no --batch"),
        (["kernels", "--decode-tokens", "2", "--against", "x"], 3, "no --decode-tokens"),
        (["some/model", "--ops", "full"], 3, "takes no --ops"),
        (["kernels", "--ops", "everything"], 3, "bench_kernels.ops.0"),
        (["kernels", "--context", "8q"], 3, "'8q'"),
        (["kernels", "--set", "bench_kernels.heads=['6/4']"], 3, "4 does not divide 6"),
        (["kernels", "--device", "cpu", "--lists", "absent"], 7, "absent"),
    ],
)
def test_errors_are_one_line(
    hysparse: Hysparse, args: list[str], exit_code: int, message: str
) -> None:
    run = hysparse("bench", *args)
    assert run.exit_code == exit_code, run.stderr
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""


def test_a_k_is_1024(hysparse: Hysparse, tiny_recipe: Path) -> None:
    args = ("--recipe", tiny_recipe, "--ops", "window", "--context", "1k,7", "--json")
    run = hysparse("bench", "kernels", *args)
    assert json.loads(run.stdout)["options"]["context"] == [1024, 7]


def test_real_lists_are_tiled_to_length(tiny_lists: Path) -> None:
    tiled = lists.read_lists(tiny_lists, 60, 3, 2, 8)
    assert tiled.shape == (1, 60, 3, 2) and tiled.dtype == torch.int32
    own = torch.arange(60) // 8
    assert torch.equal(tiled[0, :, 2].amax(-1).long(), own)  # each among its own blocks
    assert tiled[0, 30].tolist() == [[3, -1]] * 3  # the file's first block, its second time


def test_lists_of_other_sizes_are_refused(tiny_lists: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match=r"bench_kernels\.block_size=8"):
        lists.read_lists(tiny_lists, 60, 3, 16, 64)
    other = tmp_path / "other.safetensors"
    save_file({"layer.0": torch.zeros(3)}, other)
    with pytest.raises(UnreadableInput, match="inspect-topk --lists"):
        lists.read_lists(other, 60, 3, 2, 8)


def test_inspect_topk_writes_lists_that_the_bench_reads(
    hysparse: Hysparse, tiny_converted: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "real.safetensors"
    text = " ".join(f"w{i % 61}" for i in range(40))
    run = hysparse("inspect-topk", tiny_converted, "--prompt", text, "--lists", path)
    assert run.exit_code == 0, run.stderr
    stored = load_file(path)
    assert list(stored) == ["layer.0"] and stored["layer.0"].shape == (40, 2, 2)
    args = ("--recipe", tiny_recipe, "--ops", "block-sparse", "--lists", path, "--json")
    run = hysparse("bench", "kernels", *args)
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["rows"][0]["op"] == "block-sparse forward, real lists"
    run = hysparse("inspect-topk", tiny_converted, "--prompt", text, "--lists", tmp_path / "no/x")
    assert run.exit_code == 3 and "can't be written" in run.stderr


@pytest.mark.parametrize("make", [lists.random_lists, lists.local_lists])
def test_made_up_lists_are_distinct_visible_and_padded_at_the_end(make: Any) -> None:
    made = make(100, 3, 4, 8, torch.Generator().manual_seed(0))
    assert made.shape == (1, 100, 3, 4) and made.dtype == torch.int32
    own = (torch.arange(100) // 8)[None, :, None]
    assert (made <= own[..., None]).all()
    assert torch.equal((made >= 0).sum(-1), (own + 1).clamp(max=4).expand(1, 100, 3))
    for row in made[0].flatten(0, 1).tolist():
        ids = [n for n in row if n >= 0]
        assert ids == sorted(set(ids)) and row == ids + [-1] * (4 - len(ids))


def test_pairs_are_counted_as_seen() -> None:
    block_idx = torch.tensor([[[[0, -1]], [[0, -1]], [[0, 1]]]], dtype=torch.int32)
    assert lists.pairs_of(block_idx, 2) == 1 + 2 + (2 + 1)


def test_targets_judge_by_what_they_compare_with() -> None:
    target = Target("speedup", 3.0, None, (FLA_NSA, XUNHAO_NSA))
    assert target.value(2.0, {FLA_NSA: 8.0, XUNHAO_NSA: 7.0}, None) == pytest.approx(3.5)
    assert target.value(2.0, {CUDNN: 8.0}, None) is None
    assert target.met(3.5) and not target.met(2.9)
    assert Target("time", 1.25, None, (CUDNN,)).met(1.2)
    assert str(Target("ms", 0.01, 0.006)) == "≤ 10 µs (aim 6 µs)"
    assert not targets_of("decode, sparse layer", group=4, batch=16, keys=32768)
    assert len(targets_of("block-sparse forward, real lists", group=4, batch=1, keys=32768)) == 2


def test_targets_are_of_rows_that_exist() -> None:
    """A row renamed would lose its targets in silence."""
    options = KernelBenchOptions.model_validate(yaml.safe_load(TINY)["bench_kernels"])
    cases = cases_of(options, torch.device("cpu"))
    names = {case.name.replace("synthetic", "real") for case in cases}
    assert set(TARGETS) <= names


def test_latency_percentiles() -> None:
    latency = Latency([float(i) for i in range(11)])
    assert (latency.percentile(10), latency.median, latency.percentile(90)) == (1.0, 5.0, 9.0)
