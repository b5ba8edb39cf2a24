"""The damage ledger: its first rung is the dense model, its last the model as written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hysparse_cli.convert.ledger import Ledger, Losses, measure_ledger, put_tensors
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.losses import token_losses
from hysparse_cli.model.modeling import install
from hysparse_cli.texts.calibration import CalibrationText
from tests.conftest import Hysparse
from tests.model.equivalences import SPEC, TOKENS, ids
from tests.model.tiny import KINDS, dense_model, hysparse_model

SIZES = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8, "--pattern", "FSSF")
CALIBRATION = (
    *("--set", "convert.calibration_tokens=512"),
    *("--set", "convert.calibration_sequence_tokens=256"),
)


def text(rows: int = 1) -> CalibrationText:
    answers = torch.zeros(rows, TOKENS, dtype=torch.bool)
    answers[:, 30:33] = True
    return CalibrationText(ids(batch=rows), answers)


def losses(model: Any, on: CalibrationText) -> Losses:
    found = token_losses(model, on.rows).double()
    return Losses(float(found.mean()), float(found[on.answers[:, 1:]].mean()))


def ledger_of(family: str, spec: HysparseSpec) -> Ledger:
    """The ledger of a dense model made sparse in place, with a HySparse model's new tensors."""
    return installed_ledger(dense_model(family), hysparse_model(family, spec), spec)


def installed_ledger(dense: Any, sparse: Any, spec: HysparseSpec) -> Ledger:
    install(dense, spec)
    put_tensors(dense.double(), {n: p for n, p in sparse.named_parameters() if ".hysparse." in n})
    return measure_ledger(dense, spec, text(), lambda done, total: None)


@pytest.mark.parametrize("family", KINDS)
def test_it_goes_from_the_dense_model_to_the_one_that_is_written(family: str) -> None:
    # gemma2 caps its logits, which transformers' sdpa leaves out
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    dense, sparse = dense_model(family, **options), hysparse_model(family, SPEC)
    sparse.load_state_dict(dense.state_dict(), strict=False)
    at_the_start, at_the_end = losses(dense, text()), losses(sparse, text())
    ledger = installed_ledger(dense, sparse, SPEC)
    # some families compute norms, softmaxes or routers in float32
    assert ledger.dense == pytest.approx(at_the_start, abs=1e-5)
    assert ledger.total[-1] == pytest.approx(at_the_end, abs=1e-5)
    assert ledger.steps == ("selection", "shared KV", "window", "gates and sinks")
    assert list(ledger.by_layer) == [1, 2, 4]
    assert len({*ledger.total, *(rung for steps in ledger.by_layer.values() for rung in steps)}) > 9


def test_a_layer_alone_leaves_the_others_dense() -> None:
    one, all_of_them = ledger_of("llama", replace(SPEC, pattern="FFFFS")), ledger_of("llama", SPEC)
    assert one.by_layer[4] == one.total
    for alone, expected in zip(all_of_them.by_layer[4][:3], one.total, strict=False):
        assert alone == pytest.approx(expected, abs=1e-12)


def test_selecting_everything_from_own_keys_costs_nothing() -> None:
    spec = replace(SPEC, top_k_tokens=TOKENS, sparse_kv="own", window_kv="none")
    ledger = ledger_of("llama", spec)
    assert ledger.steps == ("selection", "gates and sinks")
    assert ledger.total[0] == pytest.approx(ledger.dense, abs=1e-12)
    assert abs(ledger.total[1].minus(ledger.dense).all) > 1e-3, "sinks are random"


def test_hybrid_swa_has_one_step() -> None:
    ledger = ledger_of("llama", replace(SPEC, layout="hybrid-swa"))
    assert ledger.steps == ("window and sinks",)
    assert ledger.total[0].all != pytest.approx(ledger.dense.all, abs=1e-3)


def test_text_without_answers_has_no_loss_of_answers() -> None:
    model = dense_model("llama")
    install(model, SPEC)
    put_tensors(model.double(), {})
    rows = ids()
    nothing = CalibrationText(rows, torch.zeros_like(rows, dtype=torch.bool))
    seen: list[tuple[int, int]] = []
    ledger = measure_ledger(model, SPEC, nothing, lambda *at: seen.append(at))
    assert ledger.dense.answers is None and ledger.as_json()["steps"][0]["answers"] is None
    forwards = 2 * (1 + 4 * 4)
    assert seen == [(done, forwards) for done in range(forwards + 1)]


def test_convert_explains_what_it_wrote(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    some = ("--set", "convert.explain_tokens=300")
    options = (*SIZES, *CALIBRATION, *some, "--explain", "--init", "copy")
    dry = hysparse("convert", tiny_original, out, *options, "--dry-run", "--json")
    assert dry.exit_code == 0 and not out.exists()
    run = hysparse("convert", tiny_original, out, *options)
    assert run.exit_code == 0 and run.stderr == ""
    assert "damage: loss of all 255 tokens" in run.stdout and "planted answers" in run.stdout
    report = json.loads((out / "hysparse_report.json").read_text())["plan"]
    assert json.loads(dry.stdout) == report
    ledger = report["ledger"]
    assert ledger["schema"] == "hysparse.ledger/1" and ledger["answer_tokens"] > 0
    assert list(ledger["by_layer"]) == ["1", "2"]
    written = AutoModelForCausalLM.from_pretrained(out).eval()
    assert ledger["steps"][-1]["all"] == pytest.approx(_loss_as_calibrated(written, out), abs=1e-5)
    dense = AutoModelForCausalLM.from_pretrained(tiny_original).eval()
    assert ledger["dense"]["all"] == pytest.approx(_loss_as_calibrated(dense, out), abs=1e-5)


def _loss_as_calibrated(model: Any, folder: Path) -> float:
    from hysparse_cli.model.loading import load_tokenizer
    from hysparse_cli.texts.calibration import calibration_text

    text = calibration_text(
        load_tokenizer(folder),
        data=None,
        text_field="text",
        tokens=512,
        sequence_tokens=256,
        seed=0,
    )
    return float(token_losses(model, text.rows[:1]).double().mean())
