"""hysparse bench: bytes against arithmetic, turns, rows where memory runs out, its command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.bench import run as sweep
from hysparse_cli.bench.clock import Timing, timed
from hysparse_cli.bench.decode import decode
from hysparse_cli.bench.prefill import prefill
from hysparse_cli.bench.run import bench
from hysparse_cli.kv_cache import held_kv_bytes
from hysparse_cli.loading import load
from hysparse_cli.recipe import BenchOptions
from tests.conftest import Hysparse

BEYOND_ANY_MEMORY = 10**14
QUICK = ("--context", "24", "--decode-tokens", "2", "--repeat", "2")


def test_a_dense_cache_holds_what_arithmetic_says(tiny_original: Path) -> None:
    model = load(str(tiny_original)).model
    start = prefill(model, torch.arange(3, 43).view(2, 20))
    kv_heads, head_dim, layers, itemsize = 2, 8, 4, 4
    assert held_kv_bytes(start.cache) == 2 * 2 * 20 * kv_heads * head_dim * layers * itemsize


def test_bytes_of_a_view_are_those_it_keeps_alive(tiny_original: Path) -> None:
    cache = prefill(load(str(tiny_original)).model, torch.arange(3, 43).view(2, 20)).cache
    whole = held_kv_bytes(cache)
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, -3:]
    assert held_kv_bytes(cache) == whole


def test_prefill_and_decode_write_what_generate_does(tiny_original: Path) -> None:
    model = load(str(tiny_original)).model
    prompt = torch.arange(3, 43).view(2, 20)
    start = prefill(model, prompt)
    first = start.next_ids.clone()
    last = decode(model, start, 3)
    written = model.generate(
        prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert torch.equal(written[:, 20:21], first) and torch.equal(written[:, -1:], last)


def test_timing() -> None:
    result, milliseconds = timed(lambda: "done", torch.device("cpu"))
    assert result == "done" and milliseconds >= 0
    timing = Timing([3.0, 1.0, 2.0])
    numbers = timing.as_json("ttft")
    assert numbers["median_ttft_ms"] == 2.0 and numbers["max_ttft_ms"] == 3.0
    assert str(timing) == "2.00 ±50%"
    assert str(Timing([1234.5])) == "1,234 ±0%"


def test_checkpoints_take_turns(
    tiny_original: Path, tiny_converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = []
    original = sweep._run_once

    def spied(model: Any, *args: Any) -> Any:
        turns.append(type(model).__name__)
        return original(model, *args)

    monkeypatch.setattr(sweep, "_run_once", spied)
    options = BenchOptions(against=[str(tiny_original)], context=[24], decode_tokens=1, repeat=2)
    result = bench(str(tiny_converted), options)
    assert turns == ["HySparseQwen3ForCausalLM", "Qwen3ForCausalLM"] * 3
    assert all(row.ttft is not None and len(row.ttft.samples_ms) == 2 for row in result.rows)


def test_bench_shows_checkpoints_side_by_side(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path
) -> None:
    run = hysparse("bench", tiny_converted, "--against", tiny_original, *QUICK, "--batch", "1,2")
    assert run.exit_code == 0, run.stderr
    assert "Measured on cpu" in run.stdout
    assert run.stdout.count("converted") == 3 and "kernels: reference" in run.stdout


def test_json_says_what_it_was_measured_on(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path
) -> None:
    args = ("bench", tiny_converted, "--against", tiny_original, *QUICK, "--dtype", "bfloat16")
    result = json.loads(hysparse(*args, "--json").stdout)
    assert result["schema"] == "hysparse.bench/1"
    assert result["environment"]["device"] == "cpu" and "torch" in result["environment"]
    subject, against = result["subjects"]
    assert subject["dtype"] == "bfloat16" and subject["attention"] == "hysparse FSSF"
    assert against["kernels"] == {} and len(subject["kernels"]) == 3
    assert all(name.startswith("reference") for name in subject["kernels"].values())
    sparse, dense = result["rows"]
    assert dense["allocated_kv_bytes"] == dense["arithmetic_kv_bytes"]
    assert sparse["allocated_kv_bytes"] == sparse["arithmetic_kv_bytes"]
    assert sparse["arithmetic_kv_bytes"] < dense["arithmetic_kv_bytes"]
    assert len(sparse["ttfts_ms"]) == 2 and sparse["median_tpot_ms"] > 0
    assert sparse["output_throughput"] == pytest.approx(1e3 / sparse["median_tpot_ms"])


def test_out_of_memory_is_a_row_and_not_the_end(
    hysparse: Hysparse, tiny_original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # the batch is a long number
    args = ("bench", tiny_original, *QUICK, "--batch", f"{BEYOND_ANY_MEMORY},1")
    run = hysparse(*args, "--json")
    assert run.exit_code == 0, run.stderr
    huge, small = json.loads(run.stdout)["rows"]
    assert huge["error"] == "out of memory" and huge["allocated_kv_bytes"] is None
    assert small["error"] is None
    assert "out of memory" in hysparse(*args).stdout


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["--context", "510"], 3, "need 526 positions"),
        (["--context", "0"], 3, "bench.context.0"),
        ([*QUICK, "--against", "absent/model/x"], 7, "absent/model/x"),
    ],
)
def test_errors_are_one_line(
    hysparse: Hysparse, tiny_original: Path, args: list[str], exit_code: int, message: str
) -> None:
    run = hysparse("bench", tiny_original, *args)
    assert run.exit_code == exit_code, run.stderr
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""
