"""The whole path on real checkpoints: converted by the command line, run by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hysparse_cli.model.kv_cache import held_kv_bytes, kv_cache_of
from tests.conftest import Hysparse

TEXT = "One day, a little girl named Lily found a key in the garden. " * 20
CHECKPOINTS = ["stories_260k", "novels_25m"]


@pytest.fixture(params=CHECKPOINTS)
def dense(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def input_ids(folder: Path, tokens: int) -> torch.Tensor:
    ids: torch.Tensor = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    return ids[:, :tokens]


@torch.no_grad()
def test_layout_full_is_the_dense_model_bit_for_bit(
    dense: Path, hysparse: Hysparse, tmp_path: Path
) -> None:
    assert hysparse("convert", dense, tmp_path / "full", "--layout", "full").exit_code == 0
    x = input_ids(dense, 300)
    for dtype in (torch.float32, torch.bfloat16):
        expected = load(dense, dtype)(x).logits
        assert load(tmp_path / "full", dtype)(x).logits.equal(expected)


@torch.no_grad()
def test_decoding_with_a_cache_is_reading_without_one(
    dense: Path, hysparse: Hysparse, tmp_path: Path
) -> None:
    sizes = ("--block-size", 16, "--top-k-tokens", 64, "--window-tokens", 32)
    assert hysparse("convert", dense, tmp_path / "out", *sizes).exit_code == 0
    model, x = load(tmp_path / "out", torch.float64), input_ids(dense, 220)
    whole = model(x, use_cache=False).logits
    past = model(x[:, :200], use_cache=True).past_key_values
    for i in range(200, 220):
        step = model(x[:, i : i + 1], past_key_values=past, use_cache=True).logits
        assert (step[:, 0] - whole[:, i]).abs().max() < 1e-6  # norms and softmaxes in float32


@torch.no_grad()
@pytest.mark.parametrize("ratio", ["1:3", "1:11"])
def test_kv_bytes_of_a_real_cache_are_the_arithmetic(
    ratio: str, novels_25m: Path, hysparse: Hysparse, tmp_path: Path
) -> None:
    assert hysparse("convert", novels_25m, tmp_path / "out", "--ratio", ratio).exit_code == 0
    model, x = load(tmp_path / "out", torch.bfloat16), input_ids(novels_25m, 300)
    cache = model(x, use_cache=True).past_key_values
    counted = kv_cache_of(model.config).total_bytes(300, itemsize=2)
    full_layers = {"1:3": 4, "1:11": 2}[ratio]
    by_hand = (full_layers * 300 + (12 - full_layers) * 127) * 2 * 2 * 64 * 2
    assert held_kv_bytes(cache) == counted == by_hand
