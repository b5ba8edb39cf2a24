"""Two processes that divide each row's tokens compute what one does with whole rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from hysparse_cli.errors import Interrupted, InvalidRecipe, UnsupportedModel
from hysparse_cli.finetune import finetune
from hysparse_cli.finetune.context_parallel import (
    LocalBatch,
    make_context_parallel,
    prepare_attention,
)
from hysparse_cli.finetune.data import Row, rows_of_step
from hysparse_cli.finetune.losses import next_token_sums
from hysparse_cli.finetune.result import Progress
from hysparse_cli.recipe import FinetuneOptions
from tests.conftest import Hysparse
from tests.finetune import context_parallel_families as families
from tests.finetune.conftest import Convert
from tests.finetune.test_processes import assert_same_run, start
from tests.finetune.test_resume import arguments
from tests.model.tiny import KINDS, dense_model

ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
STAGES: list[dict[str, Any]] = [
    {"objective": "align", "steps": 3},
    {"objective": "distill", "steps": 3, "distill_weight": 0.5, "hidden_weight": 0.5},
    {"objective": "train", "steps": 3},
]


def test_divided_rows_train_as_whole_ones_and_go_on_from_their_state(
    converted: Convert, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    checkpoint, out = converted(), tmp_path / "out"
    options = FinetuneOptions(
        data=str(documents_file),
        teacher=str(tiny_original),
        stages=STAGES,
        batch_size=2,
        sequence_tokens=24,
        shuffle_rows=8,
        learning_rate=1e-3,
        save_every_steps=2,
    )
    whole = finetune(str(checkpoint), tmp_path / "whole", options, lambda now: None)

    def stop(now: Progress) -> None:
        if now.step.number == 3:
            raise KeyboardInterrupt

    saving = options.model_copy(update={"gradient_checkpointing": True})
    with pytest.raises(Interrupted):
        finetune(str(checkpoint), out, saving, stop)
    split = saving.model_copy(update={"sequence_parallel_size": 2, "resume": "auto"})
    command = ("-m", "hysparse_cli", "finetune", checkpoint, out, *arguments(split), "--json")
    run = start(*ACCELERATE, *command)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["resumed_at"], result["num_processes"]) == (2, 2)
    assert_same_run(result, out, whole)


def test_packed_documents_of_divided_rows_are_as_alone_in_all_kinds_of_families() -> None:
    worker = ("--nproc-per-node=2", "-m", "tests.finetune.context_parallel_families")
    run = start("torch.distributed.run", "--standalone", *worker)
    assert run.returncode == 0, run.stderr
    apart = json.loads(run.stdout)
    assert set(apart) == {f"{family} {kind}" for family in KINDS for kind in ("dense", "hysparse")}
    assert max(apart.values()) < 1e-5, apart  # losses and logits are float32


def test_packed_documents_are_as_alone_where_transformers_mixes_them() -> None:
    mixed = families.dense_model("gpt_oss")
    batch = families.packed()
    expected = next_token_total(mixed, families.alone(batch))
    assert next_token_total(mixed, [batch]) != pytest.approx(expected, rel=1e-4)
    prepare_attention(mixed, "tiny", 1, trained=True)
    assert next_token_total(mixed, [batch]) == pytest.approx(expected, rel=1e-6)


def next_token_total(model: Any, batches: list[Row]) -> float:
    return sum(next_token_sums(model, LocalBatch(batch)).total.item() for batch in batches)


def test_what_processes_cannot_divide_is_refused(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    flags = ("--data", documents_file, "--set", "finetune.sequence_parallel_size=2")
    run = hysparse("finetune", tiny_original, tmp_path / "out", *flags)
    assert run.exit_code == 3 and len(run.stderr.splitlines()) == 1
    assert "sequence_parallel_size is 2, but the run has 1 process: make" in run.stderr
    run = hysparse("finetune", tiny_original, tmp_path / "out", *flags, "--sequence-tokens=25")
    assert run.exit_code == 3
    assert "sequence_tokens 25 can't be split evenly by sequence_parallel_size 2" in run.stderr

    options = FinetuneOptions(batch_size=3, sequence_parallel_size=2)
    assert rows_of_step(options, 2) == rows_of_step(options, 6) == 3
    with pytest.raises(InvalidRecipe, match=r"3 rows .*, which 2 groups of 2 processes can't"):
        rows_of_step(options, 4)
    with pytest.raises(InvalidRecipe, match="the run has 3 processes"):
        rows_of_step(options, 3)


def test_models_that_cannot_see_divided_rows_are_refused() -> None:
    model = dense_model("llama")
    with pytest.raises(InvalidRecipe, match=r"size is 4, but tiny has 2 KV heads, which"):
        make_context_parallel(model, "tiny", 4, trained=True)
    model.config.attention_dropout = 0.1
    with pytest.raises(InvalidRecipe, match=r"tiny drops out 0\.1 of its attention"):
        make_context_parallel(model, "tiny", 2, trained=True)
    make_context_parallel(model, "tiny", 2, trained=False)
    model.config.rope_parameters = {"rope_type": "longrope"}
    with pytest.raises(InvalidRecipe, match=r"rotates by the length of a row \(longrope"):
        make_context_parallel(model, "tiny", 2, trained=False)
    model.config.model_type = "stablelm"
    with pytest.raises(UnsupportedModel, match="stablelm"):
        make_context_parallel(model, "tiny", 2, trained=False)
