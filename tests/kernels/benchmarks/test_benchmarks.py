"""make bench-kernels: its command line, tables, peers, and what a wrong kernel does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.__main__ import main
from hysparse_kernels import backends, reference
from hysparse_kernels.backends import Backend
from tests.conftest import Hysparse, Run

TINY = (
    *("--context", "40", "--heads", "4/2", "--head-dim", "8", "--block-size", "8"),
    *("--top-k-tokens", "16", "--window-tokens", "8", "--decode-batch", "2"),
    *("--decode-context", "33", "--device", "cpu"),
)

Benchmarks = Callable[..., Run]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmarks:
    """The benchmarks at a tiny size, run in this process; later arguments count."""
    monkeypatch.setattr("hysparse_cli.progress.PATIENCE_SECONDS", 3600.0)

    def run(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *TINY, *map(str, args)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


def wrong(monkeypatch: pytest.MonkeyPatch, op: str, spoil: Callable[[Any], Any]) -> None:
    """Put a backend in front whose ``op`` gives the reference's result, spoilt."""

    def spoilt(*args: Any, **options: Any) -> Any:
        return spoil(getattr(reference, op)(*args, **options))

    module = SimpleNamespace(**{**vars(reference), op: spoilt})
    backend = Backend("spoilt", module, lambda call: None)  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "BACKENDS", (backend, *backends.BACKENDS))


def test_every_op_is_timed_and_checked_in_both_directions(benchmarks: Benchmarks) -> None:
    run = benchmarks("--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["schema"] == "hysparse.bench-kernels/2" and result["failures"] == []
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
    benchmarks: Benchmarks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)  # as where it is not installed
    out = tmp_path / "results" / "new"
    run = benchmarks("--ops", "block-sparse,window", "--output", out)
    assert run.exit_code == 0, run.stderr
    written = (out / "kernels.md").read_text()
    assert run.stdout.strip() == written.strip()
    assert "block-sparse forward, random lists" in written
    assert "decode" not in written.split("ms:")[0]
    assert "synthetic lists: made up" in written and "kernels: reference" in written
    assert "fla NSA (fla" in written and "XunhaoLai NSA (native_sparse_attention" in written
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 6 and len({line.count(" | ") for line in rows}) == 1
    assert json.loads((out / "kernels.json").read_text())["schema"] == "hysparse.bench-kernels/2"


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
    benchmarks: Benchmarks,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    ops: str,
    spoil: Callable[[Any], Any],
    what: str,
) -> None:
    wrong(monkeypatch, op, spoil)
    run = benchmarks("--ops", ops)
    assert run.exit_code == 6, run.stderr
    assert what in run.stderr and run.stderr.count("\n") == 1
    assert "WRONG" in run.stdout and "spoilt" in run.stdout


def test_a_kernel_that_raises_fails_and_one_without_memory_does_not(
    benchmarks: Benchmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(result: Any) -> Any:
        raise error

    wrong(monkeypatch, "sliding_window_attention", spoil)
    args = ("--ops", "window", "--json")
    error: Exception = ValueError("no such thing. And more.")
    run = benchmarks(*args)
    assert run.exit_code == 6 and "raised ValueError: no such thing" in run.stderr
    assert json.loads(run.stdout)["rows"][0]["error"] == "ValueError: no such thing"
    error = torch.OutOfMemoryError("CUDA out of memory")
    run = benchmarks(*args)
    assert run.exit_code == 0, run.stderr
    assert {row["error"] for row in json.loads(run.stdout)["rows"]} == {"out of memory"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(benchmarks: Benchmarks) -> None:
    run = benchmarks("--device", "cuda")
    assert run.exit_code == 5 and "--device cpu" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["--batch", "2"], 2, "unrecognized arguments: --batch 2"),
        (["--ops", "everything"], 2, "'everything' is unknown; known: full,"),
        (["--context", "8q"], 2, "'8q' is no number"),
        (["--context", "0"], 2, "'0' is no number"),
        (["--heads", "6/4"], 2, "4 does not divide 6"),
        (["--heads", "6"], 2, "'6' are no query and KV heads"),
        (["--block-size", "24"], 2, "24 does not divide top-k tokens 16"),
        (["--lists", "absent"], 7, "absent"),
    ],
)
def test_errors_are_one_line(
    benchmarks: Benchmarks, args: list[str], exit_code: int, message: str
) -> None:
    run = benchmarks(*args)
    assert run.exit_code == exit_code, run.stderr
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""


def test_an_output_that_is_a_file(benchmarks: Benchmarks, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    run = benchmarks("--ops", "window", "--output", tmp_path / "out")
    assert run.exit_code == 3 and "is a file: give a folder" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_k_is_1024(benchmarks: Benchmarks) -> None:
    run = benchmarks("--ops", "window", "--context", "1k,7", "--json")
    assert json.loads(run.stdout)["options"]["context"] == [1024, 7]


def test_inspect_topk_writes_lists_that_the_bench_reads(
    hysparse: Hysparse, benchmarks: Benchmarks, tiny_converted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "real.safetensors"
    text = " ".join(f"w{i % 61}" for i in range(40))
    run = hysparse("inspect-topk", tiny_converted, "--prompt", text, "--lists", path)
    assert run.exit_code == 0, run.stderr
    stored = load_file(path)
    assert list(stored) == ["layer.0"] and stored["layer.0"].shape == (40, 2, 2)
    run = benchmarks("--ops", "block-sparse", "--lists", path, "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["rows"][0]["op"] == "block-sparse forward, real lists"
    run = hysparse("inspect-topk", tiny_converted, "--prompt", text, "--lists", tmp_path / "no/x")
    assert run.exit_code == 3 and "can't be written" in run.stderr
