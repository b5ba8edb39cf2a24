"""Every command that reads text reads it through the same reader, and finds bad rows in time."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.finetune.data import PackedRows
from hysparse_cli.model.loading import load_tokenizer
from hysparse_cli.recipe import FinetuneOptions
from tests.conftest import Hysparse
from tests.texts.documents.samples import COMPRESS, jsonl, table

BAD = b'{"text": "w1 w2"}\n[1]\n{"text": "w3\\ud800"}\n'
EVAL = ("--sequence-tokens", 16, "--json")
FINETUNE = ("--steps", 2, "--batch-size", 1, "--sequence-tokens", 16)


@pytest.fixture
def texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(61)}" for _ in range(100)) for _ in range(8)]


def test_eval_gives_the_same_loss_whatever_the_format(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, texts: list[str]
) -> None:
    records = [{"text": text} for text in texts]
    contents = {
        "a.jsonl": jsonl(texts),
        "a.json": json.dumps(records, indent=1).encode(),
        "a.CSV": b"\xef\xbb\xbf" + table(texts),
        "a.jsonl.zst": COMPRESS["zst"](jsonl(texts)),
    }
    losses = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        run = hysparse("eval", tiny_original, "--data", tmp_path / name, *EVAL)
        assert run.exit_code == 0, run.stderr
        losses[name] = json.loads(run.stdout)["checkpoints"][0]["loss"]
    assert all(loss == losses["a.jsonl"] for loss in losses.values())
    assert losses["a.jsonl"]["tokens"] == 8 * (6 * 15 + 3)


@pytest.mark.parametrize("command", ["eval", "finetune", "convert", "inspect-topk"])
def test_each_command_refuses_what_is_no_text_in_one_line(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    words: dict[str, tuple[object, ...]] = {
        "eval": ("eval", tiny_original, "--data"),
        "finetune": ("finetune", tiny_original, out, *FINETUNE, "--data"),
        "convert": ("convert", tiny_original, out, "--init", "aligned", "--calibration"),
        "inspect-topk": ("inspect-topk", tiny_original, "--data"),
    }
    contents = {
        "a.jsonl": (BAD[18:], "a.jsonl, line 1 holds a list"),
        "a.pdf": (b"%PDF", "a.pdf ends in .pdf, which is not read: give .jsonl"),
        "a.csv": (b"body\nw1 w2\n", "a.csv, line 1 has no field 'text' (it has: 'body')"),
        "a.txt": (b" \n", "a.txt holds no text"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        run = hysparse(*words[command], tmp_path / name)
        assert run.exit_code == 7, run.stderr
        lines = [line for line in run.stderr.splitlines() if "state is saved" not in line]
        lines = [line for line in lines if line.startswith("hysparse: ")]
        assert len(lines) == 1 and message in lines[0] and "Traceback" not in run.stderr
        assert run.stdout == "" or command == "convert"  # whose plan is there before
        assert not out.exists() and not list(tmp_path.glob("out.*"))


def test_a_bad_row_at_the_end_costs_no_step(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, texts: list[str]
) -> None:
    data, out = tmp_path / "a.jsonl", tmp_path / "out"
    data.write_bytes(jsonl(texts * 50) + b'{"text": 5}\n')
    args = ("finetune", tiny_original, out, "--data", data, *FINETUNE, "--save-every-steps", 1)
    run = hysparse(*args)
    assert run.exit_code == 7 and not out.exists() and not list(tmp_path.glob("out.*"))
    assert "a.jsonl, line 401: field 'text' holds a number (5), not text" in run.stderr
    assert "or skip such rows with --skip-bad-rows" in run.stderr and "step 1" not in run.stderr
    run = hysparse(*args, "--skip-bad-rows", "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["skipped_rows"]["count"] == 1
    assert f"warning: 1 bad rows of {data} were skipped; the first: data {data}, line 401" in (
        run.stderr
    )


def test_skipped_rows_are_counted_in_what_eval_and_finetune_show(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, texts: list[str]
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(jsonl(texts) + BAD)
    (tmp_path / "good.jsonl").write_bytes(jsonl([*texts, "w1 w2"]))
    found = []
    for name in ("bad.jsonl", "good.jsonl"):
        run = hysparse("eval", tiny_original, "--data", tmp_path / name, "--skip-bad-rows", *EVAL)
        assert run.exit_code == 0, run.stderr
        found.append(json.loads(run.stdout))
    bad, good = found
    assert bad["checkpoints"][0]["loss"] == good["checkpoints"][0]["loss"]
    assert bad["skipped_rows"]["count"] == 2 and "line 10 holds" in bad["skipped_rows"]["first"]
    assert good["skipped_rows"] == {"count": 0, "first": None}
    args = (tiny_original, "--data", tmp_path / "bad.jsonl", "--skip-bad-rows")
    run = hysparse("eval", *args, "--sequence-tokens", 16)
    assert "bad rows skipped" in run.stdout and "2 bad rows of" in run.stderr
    run = hysparse("finetune", tiny_original, tmp_path / "out", *args[1:], *FINETUNE)
    assert run.exit_code == 0 and "2 bad rows skipped" in " ".join(run.stdout.split())


def test_where_all_rows_are_bad_the_first_is_told(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, texts: list[str]
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_bytes(jsonl(texts, "body"))
    for command in (("eval", tiny_original), ("finetune", tiny_original, tmp_path / "out")):
        run = hysparse(*command, "--data", data, "--skip-bad-rows")
        assert run.exit_code == 7
        assert "holds no text: 8 rows were skipped; the first: data" in run.stderr
        assert "it has: 'n', 'body'" in run.stderr


def test_rows_of_a_data_set_are_checked_as_they_are_read(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, texts: list[str]
) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": text} for text in texts] + [{"text": "w1\ud800"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("finetune", tiny_original, tmp_path / "out", "--data", f"hub:{folder}", *FINETUNE)
    run = hysparse(*args)
    assert run.exit_code == 7 and "Failed to load" not in run.stderr, run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"hysparse: data hub:{folder} can't be read: ")


def test_a_file_that_changes_under_a_run_is_refused(tiny_original: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_bytes(jsonl(["w1 w2 w3 w4 w5 w6 w7"] * 5))
    options: dict[str, Any] = {"sequence_tokens": 16, "shuffle_rows": 1}
    rows = PackedRows(FinetuneOptions(data=str(data), **options), load_tokenizer(tiny_original))
    stream = iter(rows)
    assert len(list(islice(stream, 6))) == 6
    with data.open("ab") as file:
        file.write(jsonl(["w8"]))
    with pytest.raises(UnreadableInput, match=r"a\.jsonl was changed while the run read it: give"):
        list(islice(stream, 6))
