"""The benchmarks on a CUDA device: each op and its clock run, in bfloat16."""

import json

import pytest
import torch

from tests.kernels.benchmarks.test_benchmarks import Benchmarks, benchmarks  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_op_is_timed_beside_its_peers(benchmarks: Benchmarks) -> None:  # noqa: F811
    sizes = ("--context", "1k", "--heads", "8/2", "--head-dim", 64, "--block-size", 64)
    more = ("--top-k-tokens", 256, "--decode-context", "2k", "--measure-ms", 5)
    run = benchmarks("--device", "cuda", *sizes, *more, "--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    for row in result["rows"]:
        assert row["error"] is None and "triton" in row["backend"]
        assert 0 < row["p10_latency_ms"] <= row["p90_latency_ms"] < 100
        assert row["fraction_of_ceiling"] > 0
    (decode,) = (row for row in result["rows"] if row["op"] == "decode, sparse layer")
    assert decode["samples"] == 10 and decode["peers"]["FlashAttention 2"]["error"] is None
    copy, matmul = (ceiling["per_second"] for ceiling in result["ceilings"])
    assert copy > 1e11 and matmul > 1e12
