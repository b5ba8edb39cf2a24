"""Sliding windows: which tokens count, with how much before them, and what they cost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.evaluate.perplexity import cut_windows
from hysparse_cli.model.loading import load
from tests.conftest import Hysparse

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big dog. The dog was very happy and wanted to play with her. "
)


class Characters:
    """A tokenizer that reads each character as its code, after a beginning."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(ord, text)]}


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 24, 25, 26, 63])
@pytest.mark.parametrize("stride", [None, 1, 3, 9, 10])
def test_every_token_counts_once_with_what_the_stride_leaves(
    length: int, stride: int | None
) -> None:
    document = "".join(chr(1 + i) for i in range(length - 1))  # its ids count up from 0
    windows = cut_windows([document], Characters(), 10, None, stride)
    counted = [token for window in windows for token in window.ids[window.begin :]]
    missed = range(10, length, 10) if stride in (None, 10) else ()
    assert counted == [token for token in range(1, length) if token not in missed]
    for window in windows[1:]:
        assert window.begin == max(1, 10 - (stride or 10))
        assert window.ids == list(range(window.ids[0], window.ids[0] + len(window.ids)))


def test_documents_do_not_share_windows() -> None:
    windows = cut_windows(["a" * 12, "b" * 3], Characters(), 10, None, 5)
    assert [len(window.ids) for window in windows] == [10, 8, 4]
    assert [window.begin for window in windows] == [1, 5, 1]


def _expected(folder: Path, text: str, length: int, stride: int) -> list[tuple[int, list[float]]]:
    """Each window's length and losses, in float64: a plain loop over logits of whole windows."""
    loaded = load(str(folder), dtype="float32", device="cpu")
    model = loaded.model.double()
    ids = loaded.tokenizer(text)["input_ids"]
    losses, end_before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0]
        assert logits.dtype == torch.float64
        of_window = []
        for at in range(max(end_before, begin + 1), end):
            scores = logits[at - 1 - begin].tolist()
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            of_window.append(log_sum - scores[ids[at]])
        losses.append((end - begin, of_window))
        end_before = end
        if end == len(ids):
            return losses
    raise AssertionError


@pytest.mark.parametrize(("stride", "batch_size"), [(64, 1), (24, 3)])
def test_loss_of_stories_equals_an_independent_computation(
    hysparse: Hysparse, stories_260k: Path, tmp_path: Path, stride: int, batch_size: int
) -> None:
    data = tmp_path / "story.jsonl"
    data.write_text(json.dumps({"text": STORY * 2}) + "\n")
    sizes = ("--sequence-tokens", 64, "--stride", stride, "--batch-size", batch_size)
    run = hysparse("eval", stories_260k, "--data", data, *sizes, "--json")
    assert run.exit_code == 0, run.stderr
    (row,) = json.loads(run.stdout)["checkpoints"]
    expected = _expected(stories_260k, STORY * 2, 64, stride)
    losses = [nats for _, window in expected for nats in window]
    assert row["loss"]["tokens"] == len(losses) and row["loss"]["windows"] == len(expected)
    mean = sum(losses) / len(losses)
    assert row["loss"]["nats_per_token"] == pytest.approx(mean, abs=1e-5)
    assert row["loss"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    # each window of 64 gives the losses of its last tokens; 63 places in 8 parts: 7 of 8, one of 7
    whole = [window for length, window in expected if length == 64]
    placed = [(63 - len(w) + i, nats) for w in whole for i, nats in enumerate(w)]
    by_part = [[nats for at, nats in placed if at // 8 == part] for part in range(8)]
    assert row["loss"]["by_position"] == pytest.approx([sum(p) / len(p) for p in by_part], abs=1e-5)


def test_parquet_is_read_as_jsonl_is(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = ["w1 w2 w3 w4 w5", "w6 w7 w8"]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "text.parquet")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    losses = []
    for name in ("text.parquet", "text.jsonl"):
        args = ("--data", tmp_path / name, "--set", "eval.text_field=body")
        run = hysparse("eval", tiny_original, *args, "--sequence-tokens", 32, "--json")
        assert run.exit_code == 0, run.stderr
        losses.append(json.loads(run.stdout)["checkpoints"][0]["loss"])
    assert losses[0] == losses[1] and losses[0]["tokens"] == 4 + 2


def test_a_stride_longer_than_the_window_is_refused(
    hysparse: Hysparse, tiny_original: Path
) -> None:
    run = hysparse("eval", tiny_original, "--data", "x", "--sequence-tokens", 8, "--stride", 9)
    assert run.exit_code == 3
    assert "stride 9 is more than sequence_tokens 8" in run.stderr
    assert run.stderr.count("\n") == 1
