"""hysparse bench as a sweep: processes that take turns, what is printed, kept and drawn."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hysparse_cli.bench.plots import plots_of
from hysparse_cli.bench.presets import PRESETS
from hysparse_cli.bench.processes import Worker
from hysparse_cli.bench.run import bench
from hysparse_cli.bench.subjects import subjects_of
from hysparse_cli.bench.weights import config_of
from hysparse_cli.bench.worker import Cell, Failed
from hysparse_cli.model.kv_cache import kv_cache_of
from hysparse_cli.recipe import BenchOptions
from tests.conftest import Hysparse

SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "bench.json"
BEYOND_ANY_MEMORY = 2**31 - 1
QUICK = ("--decode-tokens", "2", "--warmup", "0", "--repeat", "1")
ALL = ("--phases", "memory,prefill,decode,train", "--context", "24,48", "--lists", "local", *QUICK)

TABLES = """\
converted on cpu (#), torch #
memory
B x tokens subject KV held KV counted x dense weights largest batch x dense
# x # dense 12 KiB 12 KiB 1.00x 129 KiB # #x
hybrid-swa 8 KiB 8 KiB 1.50x 129 KiB # #x
hysparse 8 KiB 8 KiB 1.50x 132 KiB # #x
# x # dense 24 KiB 24 KiB 1.00x 129 KiB # #x
hybrid-swa 14 KiB 14 KiB 1.71x 129 KiB # #x
hysparse 14 KiB 14 KiB 1.71x 132 KiB # #x
prefill
B x tokens subject TTFT ms tok/s x dense attn ms x dense of floor
# x # dense # # #x # #x #/#
hybrid-swa # # #x # #x #/#
hysparse # # #x # #x #/#
# x # dense # # #x # #x #/#
hybrid-swa # # #x # #x #/#
hysparse # # #x # #x #/#
decode
B x tokens subject TPOT ms p99 tok/s x dense attn ms x dense of floor
# x # dense # # # #x # #x #/#
hybrid-swa # # # #x # #x #/#
hysparse # # # #x # #x #/#
# x # dense # # # #x # #x #/#
hybrid-swa # # # #x # #x #/#
hysparse # # # #x # #x #/#
train
B x tokens subject step ms tok/s x dense attn ms x dense of floor
# x # dense # # #x # #x #/#
hybrid-swa # # #x # #x #/#
hysparse # # #x # #x #/#
# x # dense # # #x # #x #/#
hybrid-swa # # #x # #x #/#
hysparse # # #x # #x #/#
"""


def stable(printed: str) -> str:
    """The tables without what differs from run to run: times, and what free memory holds."""
    lines = []
    for line in printed[: printed.index("dense: dense")].splitlines():
        if not (line := " ".join(line.split()).replace("─", "").strip()):
            continue
        if ", torch " in line:
            line = re.sub(r"\(.*", "(#), torch #", line)
        elif "KiB" in line:
            line = re.sub(r"[\d,]+ [\d.]+x$", "# #x", line)
            line = re.sub(r"^\d+ x \d+", "# x #", line)
        else:
            line = re.sub(r"(?<![\w#])[\d,.]+(%|(?= |x|/|$))( ±\d+%)?", "#", line)
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def options() -> BenchOptions:
    """A tiny model without a checkpoint: a preset would do, but for its size."""
    return BenchOptions(
        phases=["prefill"], context=[24], decode_tokens=2, warmup=1, repeat=2, dtype="float32"
    )


def test_subjects_take_turns_and_the_first_turn_is_not_measured(
    tiny_original: Path, options: BenchOptions
) -> None:
    turns: list[str] = []
    wanted = {"config": str(tiny_original), "ratio": "1:2", "phases": ["prefill", "decode"]}
    result = bench(None, options.model_copy(update=wanted), lambda what, *_: turns.append(what))
    subjects = ["dense", "hybrid-swa", "hysparse"]
    phases = ("prefill 24 x 1", "decode 24 x 1")
    expected = [f"{phase}: {subject}" for phase in phases for subject in 3 * subjects]
    assert [turn for turn in turns if ": " in turn] == expected
    assert [row.subject for row in result.rows] == 2 * subjects
    first, *_, last = result.rows
    assert len(first.samples["ttfts_ms"]) == 2 and len(last.samples["tpots_ms"]) == 2 * 2
    assert [s["attention"] for s in result.subjects] == [
        "dense, sdpa",
        "hybrid-swa FSSF",
        "hysparse FSSF",
    ]
    assert {s["weights"] for s in result.subjects} == {"random"}


def test_what_is_printed_written_and_drawn_is_the_same(
    hysparse: Hysparse, tiny_converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "out"
    run = hysparse("bench", tiny_converted, *ALL, "--output", out)
    assert run.exit_code == 0, run.stderr
    assert stable(run.stdout) == TABLES
    assert f"hysparse FSSF, float32, {tiny_converted}" in " ".join(run.stdout.split())

    # all there: printed again without measuring again
    again = hysparse("bench", tiny_converted, *ALL, "--output", out, "--json")
    result = json.loads(again.stdout)
    assert result == json.loads((out / "bench.json").read_text())
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    for row in result["rows"]:
        assert row["error"] is None
        if row["phase"] in ("memory", "prefill"):
            assert row["kv_bytes"] == row["arithmetic_kv_bytes"]
    printed = hysparse("bench", tiny_converted, *ALL, "--output", out, "--format", "csv").stdout
    assert (out / "bench.csv").read_text() == printed
    lines = list(csv.DictReader(io.StringIO(printed)))
    for line, row in zip(lines, result["rows"], strict=True):
        assert all(str(row[name]) == value for name, value in line.items() if value)
    assert "| B x tokens | subject |" in (out / "bench.md").read_text()
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {plot.name for plot in plots_of(result)}
    assert {"memory", "decode-batch-1", "train-batch-1-speedup"} <= drawn
    check_plots(result)


def check_plots(result: dict[str, Any]) -> None:
    """The lines of each figure are the numbers of the JSON."""
    metrics = {"prefill-batch-1": "median_ttft_ms", "decode-batch-1": "median_tpot_ms"}
    plots = {plot.name: plot.figure().axes[0] for plot in plots_of(result)}
    for name, metric in metrics.items():
        drawn = {line.get_label(): line.get_xydata().tolist() for line in plots[name].lines}
        rows = [row for row in result["rows"] if row["phase"] == name.partition("-")[0]]
        for subject in ("dense", "hybrid-swa", "hysparse"):
            expected = [[r["context_tokens"], r[metric]] for r in rows if r["subject"] == subject]
            assert drawn[subject] == expected
    memory = {line.get_label(): line.get_ydata() for line in plots["memory"].lines}
    (first, *_), limit = memory["hysparse"], memory["memory of this machine"]
    row = next(r for r in result["rows"] if (r["subject"], r["phase"]) == ("hysparse", "memory"))
    assert first * 2**30 == pytest.approx(row["weight_bytes"] + row["kv_bytes"])
    assert limit[0] * 2**30 == pytest.approx(row["total_bytes"])


@pytest.mark.parametrize("published", sorted((SCHEMA.parents[1] / "data").glob("bench-*.json")))
def test_published_results_keep_the_schema(published: Path) -> None:
    result = json.loads(published.read_text())
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert result["rows"]


def test_out_of_memory_is_a_row_and_not_the_end(hysparse: Hysparse, tiny_original: Path) -> None:
    phases = ("--phases", "prefill,decode,train", "--context", "512")  # as much as it reads
    args = (
        "bench",
        tiny_original,
        "--subjects",
        "dense",
        *phases,
        *QUICK,
        "--batch",
        f"{BEYOND_ANY_MEMORY},1",
    )
    run = hysparse(*args, "--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        huge = row["batch"] == BEYOND_ANY_MEMORY
        assert row["error"] == ("out of memory" if huge else None)


def test_a_process_that_is_lost_is_an_error_and_the_next_turn_has_another(
    tiny_original: Path, options: BenchOptions
) -> None:
    subject, *_ = subjects_of(str(tiny_original), options, on_cuda=False)
    with Worker(subject, options) as worker:
        assert "ttfts_ms" in worker.ask(Cell("prefill", 24, 1))
        os.kill(worker.process_id, signal.SIGKILL)
        assert worker.ask(Cell("prefill", 24, 1)) == Failed("crashed: SIGKILL")
        assert "ttfts_ms" in worker.ask(Cell("prefill", 24, 1))
        last = worker.process_id
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_what_a_model_has_and_dense_attention_has_not_is_a_row(
    hysparse: Hysparse, tmp_path: Path
) -> None:
    from tests.model.tiny import dense_config

    dense_config("gemma2").save_pretrained(tmp_path)
    size = ("--context", "24", "--phases", "prefill", *QUICK, "--dtype", "float32")
    run = hysparse("bench", "--config", tmp_path, *size, "--json")
    errors = {row["subject"]: row["error"] for row in json.loads(run.stdout)["rows"]}
    assert errors["dense"] == "ValueError: SDPA has no softcap, which this model needs"
    assert errors["hysparse"] is None and errors["hybrid-swa"] is None


def test_a_killed_sweep_goes_on_where_it_stopped(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["bench", str(tiny_original), "--subjects", "dense"]
    args += ["--phases", "prefill", "--context", "24,32,40,48"]
    args += ["--repeat", "9", "--output", str(out)]
    command = [sys.executable, "-m", "hysparse_cli", *args]
    sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept, deadline = out / "rows.jsonl", time.monotonic() + 120
    while not kept.exists() or '"rows"' not in kept.read_text():
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    sweep.kill()
    sweep.wait()
    with kept.open("a") as file:
        file.write('{"rows": [{"subject": "de')  # a line that was not finished
    before = [json.loads(line) for line in kept.read_text().splitlines()[:-1]]
    done = [line["rows"][0] for line in before if "rows" in line]
    assert 0 < len(done) < 4

    run = hysparse(*args, "--json")
    assert run.exit_code == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    assert [row["context_tokens"] for row in rows] == [24, 32, 40, 48]
    for old, row in zip(done, rows, strict=False):
        assert row["ttfts_ms"] == old["samples"]["ttfts_ms"]
    other = hysparse(*args, "--set", "bench.seed=1")
    assert other.exit_code == 3 and "measured with another options" in other.stderr


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["--context", "513"], 3, "at most 512 tokens"),
        (["--context", "0"], 3, "bench.context.0"),
        (["--context", "24", "--against", "absent/model/x"], 7, "absent/model/x"),
        (["--config", "paper-7b"], 3, "give one of the two"),
        (["--subjects", "sparse"], 3, "bench.subjects.0"),
        (["--phases", "decoding"], 3, "bench.phases.0"),
        (["--ratio", "3"], 3, "not of the form 1:N"),
        (["--ratio", "1:3", "--pattern", "FSSF"], 3, "give one"),
        (["--format", "xml"], 3, "known: table, json, csv, md"),
        (["--format", "csv", "--json"], 3, "give one of them"),
    ],
)
def test_errors_are_one_line(
    hysparse: Hysparse, tiny_original: Path, args: list[str], exit_code: int, message: str
) -> None:
    run = hysparse("bench", tiny_original, *args)
    assert run.exit_code == exit_code, run.stderr
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""


@pytest.mark.parametrize(
    ("content", "exit_code", "message"),
    [
        (None, 3, "is a file: give a folder"),
        (b"", 5, "Not a directory"),
        (b"\xff\n", 7, "is not what hysparse bench wrote"),
        (b"[1]\n", 7, "is not what hysparse bench wrote"),
        (b'{"rows": []}\n', 7, "is not what hysparse bench wrote"),
    ],
)
def test_an_output_that_can_not_be_used(
    hysparse: Hysparse,
    tiny_original: Path,
    tmp_path: Path,
    content: bytes | None,
    exit_code: int,
    message: str,
) -> None:
    out = tmp_path / "out"
    if content:
        out.mkdir()
        (out / "rows.jsonl").write_bytes(content)
    else:
        out.write_text("a file")
        out = out if content is None else out / "inside"
    run = hysparse("bench", tiny_original, "--context", "24", "--output", out)
    assert run.exit_code == exit_code, run.stderr
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""


def test_an_interrupt_says_what_is_kept(tiny_original: Path, tmp_path: Path) -> None:
    args = ["bench", str(tiny_original), "--subjects", "dense"]
    args += ["--phases", "prefill", "--context", "24,32"]
    args += ["--repeat", "10000", "--output", str(tmp_path)]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "hysparse_cli", *args], stderr=subprocess.PIPE, text=True
    )
    kept, deadline = tmp_path / "rows.jsonl", time.monotonic() + 120
    while not kept.exists() or "ceilings" not in kept.read_text():
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert said.endswith(f"kept in {kept}: the same command goes on from there\n")
    assert said.count("hysparse:") == 1


def test_a_config_that_is_nowhere(hysparse: Hysparse) -> None:
    run = hysparse("bench", "--config", "absent/model/x")
    assert run.exit_code == 7 and run.stderr.count("\n") == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_papers_shapes(preset: str) -> None:
    wanted = {"paper-7b": (36, 32, 8, "1:3", 10), "paper-80b-a3b": (49, 64, 4, "1:11", 5)}
    layers, heads, kv_heads, ratio, full = wanted[preset]
    options = BenchOptions(config=preset, ratio=ratio, context=[131072])
    subjects = {s.name: s for s in subjects_of(None, options, on_cuda=True)}
    assert list(subjects) == ["dense-cudnn", "dense-flash", "hybrid-swa", "hysparse"]
    dense, spec = config_of(subjects["dense-flash"]), subjects["hysparse"].spec
    assert spec is not None and len(spec.layers.full_layers) == full
    assert (dense.num_hidden_layers, dense.num_attention_heads) == (layers, heads)
    assert (dense.num_key_value_heads, dense.head_dim) == (kv_heads, 128)
    assert kv_cache_of(config_of(subjects["hysparse"])).windows.count(None) == full


def test_random_weights_of_a_checkpoint_need_none_and_have_no_longest_context(
    tiny_converted: Path,
) -> None:
    options = BenchOptions(random_weights=True, context=[4096])
    subjects = subjects_of(str(tiny_converted), options, on_cuda=False)
    assert [subject.checkpoint for subject in subjects] == [None] * 3
    assert {subject.config["max_position_embeddings"] for subject in subjects} == {4096}
    own = BenchOptions(context=[24])
    subjects = subjects_of(str(tiny_converted), own, on_cuda=False)
    assert [s.name for s in subjects if s.checkpoint] == ["hysparse"]
    subjects = subjects_of(str(tiny_converted), own, on_cuda=True)
    assert [s.backend for s in subjects] == ["cudnn", "flash", "sdpa", "sdpa"]


def test_a_dense_checkpoint_has_its_peers_beside_it(tiny_original: Path) -> None:
    subjects = subjects_of(str(tiny_original), BenchOptions(context=[24]), on_cuda=False)
    assert [(s.name, s.checkpoint) for s in subjects] == [
        ("dense", str(tiny_original)),
        ("hybrid-swa", None),
        ("hysparse", None),
    ]
    assert subjects[2].spec is not None and subjects[2].spec.pattern == "FSSF"


def test_a_converted_checkpoint_keeps_its_pattern(hysparse: Hysparse, tiny_converted: Path) -> None:
    run = hysparse("bench", tiny_converted, "--ratio", "1:1")
    assert run.exit_code == 3 and "a pattern of its own, FSSF" in run.stderr


def test_a_checkpoint_that_can_not_be_read_ends_the_run(
    hysparse: Hysparse, tiny_checkpoint: Path
) -> None:
    shard = next(tiny_checkpoint.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    run = hysparse("bench", tiny_checkpoint, "--context", "24", "--phases", "prefill", *QUICK)
    assert run.exit_code == 7 and run.stderr.count("\n") == 1, run.stderr
    assert shard.name in run.stderr


def test_wrong_attention_fails_the_run_and_has_no_time(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    """A row as it is kept where the attention was wrong: the sweep goes on from it."""
    args = ("bench", tiny_original, "--phases", "prefill", "--context", "24", *QUICK)
    args = (*args, "--subjects", "dense,hysparse", "--output", tmp_path)
    assert hysparse(*args).exit_code == 0
    kept = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    row = next(line["rows"][1] for line in lines if "rows" in line)
    assert row["values"]["sparse_attention_error"] > 0
    row |= {"error": "wrong: sparse_attention_error 3.0e-01", "samples": {}, "values": {}}
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = hysparse(*args)
    assert run.exit_code == 6
    assert "wrong: sparse" in " ".join(run.stdout.split())
    said = "hysparse, prefill at 24 x 1: wrong: sparse_attention_error 3.0e-01"
    assert said in run.stderr and run.stderr.count("\n") == 1
