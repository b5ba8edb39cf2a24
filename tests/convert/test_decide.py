"""What the dense model decides: it is loaded once, and measuring leaves it as it is."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hysparse_cli.convert import dense as convert_dense
from hysparse_cli.convert.decide import dense_model
from hysparse_cli.convert.swaps import swap_in_place
from hysparse_cli.families import FAMILIES, family_of
from hysparse_cli.files.source import Source
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.loading import LazyModel, Loaded
from hysparse_cli.model.modeling import make_sparse
from hysparse_cli.recipe import ConvertOptions
from tests.conftest import Hysparse
from tests.model.tiny import VOCAB_SIZE
from tests.model.tiny import dense_model as tiny_model

SIZES = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
CALIBRATION = (
    *("--calibration-tokens", 512),
    *("--set", "convert.calibration_sequence_tokens=256"),
)
ALL = ("--swap-attention", "auto", "--init", "aligned", "--explain")
LONG = torch.randint(3, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the models that are loaded, and the checkpoints whose headers are read to plan."""
    found: Counter[str] = Counter()

    def counted(name: str, call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return call(*args, **kwargs)

        return counting

    load = counted("loads", AutoModelForCausalLM.from_pretrained)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    headers = counted("headers", convert_dense.open_checkpoint)
    monkeypatch.setattr(convert_dense, "open_checkpoint", headers)
    return found


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ((), 0),
        (("--dry-run",), 0),
        (("--swap-attention", "auto"), 1),
        (("--strategy", "dp", *ALL), 1),
        (("--strategy", "dp", *ALL, "--dry-run"), 1),
        (("--strategy", "kl", *ALL), 1),
    ],
    ids=["plain", "dry", "swaps", "dp", "dp dry", "kl"],
)
def test_convert_loads_the_dense_model_once_and_reads_its_headers_once(
    hysparse: Hysparse,
    calls: Counter[str],
    tiny_original: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    loads: int,
) -> None:
    run = hysparse("convert", tiny_original, tmp_path / "out", *SIZES, *CALIBRATION, *options)
    assert run.exit_code == 0, run.stderr
    assert (calls["loads"], calls["headers"]) == (loads, 1)


def test_inspect_topk_plans_and_observes_with_one_load(
    hysparse: Hysparse, calls: Counter[str], tiny_original: Path
) -> None:
    measured = ("convert.init=aligned", "convert.swap_attention=auto")
    settings = [word for setting in measured for word in ("--set", setting)]
    calibration = ("--set", "convert.calibration_tokens=512", *CALIBRATION[2:])
    options = ("--strategy", "dp", *settings, *calibration)
    run = hysparse("inspect-topk", tiny_original, *SIZES, *options, "--max-tokens", 200)
    assert run.exit_code == 0, run.stderr
    assert calls["loads"] == 1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rewiring_a_twin_leaves_the_model_as_it_is(model_type: str) -> None:
    model = tiny_model(model_type)
    dense = LazyModel("tiny", lambda: Loaded(model, None, Path()))
    expected = _logits(model)
    twin = dense.twin()
    shared = zip(twin.parameters(), model.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in shared) and _logits(twin).equal(expected)
    if family_of(model_type).attention_norms is not None:
        swap_in_place(twin, [(2, 1)], family_of(model_type))
    sizes = {"block_size": 8, "top_k_tokens": 16, "window_tokens": 8}
    make_sparse(twin, HysparseSpec("FSFSF", **sizes))
    assert not _logits(twin).equal(expected) and _logits(model).equal(expected)
    assert not any("hysparse" in name for name, _ in model.named_modules())
    assert _logits(dense.twin()).equal(expected)


def test_the_model_is_loaded_when_it_is_first_asked_for(tmp_path: Path) -> None:
    dense = dense_model(Source("nowhere", tmp_path / "nowhere"), ConvertOptions())
    assert dense.name == "nowhere"
    with pytest.raises(Exception, match="nowhere"):
        _ = dense.loaded


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(LONG, use_cache=False).logits
    return logits
