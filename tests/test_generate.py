import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.generate import generate
from hysparse_cli.model.kv_cache import kv_cache_of
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import GenerateOptions
from tests.conftest import Hysparse

PROMPT = "w1 w2 w3 w4"


@pytest.fixture
def converted(tiny_original: Path, tmp_path: Path, hysparse: Hysparse) -> Path:
    sizes = ("--top-k-tokens=8", "--block-size=4", "--window-tokens=8")
    assert hysparse("convert", tiny_original, tmp_path / "converted", *sizes).exit_code == 0
    return tmp_path / "converted"


def options(**fields: Any) -> GenerateOptions:
    return GenerateOptions(**{"prompt": PROMPT, "max_new_tokens": 12, **fields})


def test_the_text_is_what_transformers_generates(tiny_original: Path, converted: Path) -> None:
    for folder in (tiny_original, converted):
        pieces: list[str] = []
        result = generate(str(folder), options(), pieces.append)
        model, tokenizer, _ = load(str(folder))
        tokens = tokenizer(PROMPT, return_tensors="pt")
        expected = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, 4:]
        assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert "".join(pieces) == result.text
        assert (result.prompt_tokens, result.new_tokens) == (4, len(expected))


def test_kv_bytes_are_those_of_the_cache(tiny_original: Path, converted: Path) -> None:
    for folder in (tiny_original, converted):
        result = generate(str(folder), options(max_new_tokens=40), lambda text: None)
        held = result.prompt_tokens + result.new_tokens - 1  # the last token is not read
        config = load(str(folder)).model.config
        expected = kv_cache_of(config).total_bytes(held, torch.float32.itemsize)
        assert result.kv_bytes == expected


def test_sampling_follows_the_seed(tiny_original: Path) -> None:
    def text(**fields: Any) -> str:
        return generate(str(tiny_original), options(**fields), lambda text: None).text

    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1)
    assert text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
    assert text(temperature=1.0, top_p=1e-6) == text()


def test_beam_search_hands_over_the_text_at_the_end(converted: Path) -> None:
    pieces: list[str] = []
    result = generate(str(converted), options(num_beams=3), pieces.append)
    assert pieces == [result.text]


def test_text_goes_to_stdout_and_figures_to_stderr(hysparse: Hysparse, converted: Path) -> None:
    flags = ("--prompt", PROMPT, "--max-new-tokens=6", "--dtype=float32", "--device=cpu")
    run = hysparse("generate", converted, *flags)
    assert run.exit_code == 0, run.stderr
    as_json = json.loads(hysparse("generate", converted, *flags, "--json").stdout)
    assert run.stdout == as_json["text"] + "\n"
    assert "4 prompt tokens, " in run.stderr
    assert as_json["schema"] == "hysparse.generate/1"
    assert as_json["prompt_tokens"] == 4
    assert as_json["tokens_per_second"] > 0


def test_the_prompt_may_come_from_stdin(
    hysparse: Hysparse, tiny_original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = hysparse("generate", tiny_original, "--prompt", PROMPT, "--max-new-tokens=6")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert hysparse("generate", tiny_original, "--max-new-tokens=6").stdout == given.stdout


def test_chat_uses_the_template(hysparse: Hysparse, tiny_checkpoint: Path) -> None:
    flags = ("--prompt", PROMPT, "--max-new-tokens=4", "--json")
    template = "{{ messages[0]['role'] == 'user' and 'w9 w8 ' + messages[0]['content'] }}"
    (tiny_checkpoint / "chat_template.jinja").write_text(template)
    plain = json.loads(hysparse("generate", tiny_checkpoint, *flags).stdout)
    chat = json.loads(hysparse("generate", tiny_checkpoint, *flags, "--chat").stdout)
    assert (plain["prompt_tokens"], chat["prompt_tokens"]) == (4, 6)


def test_temperature_reaches_the_sampler(hysparse: Hysparse, tiny_original: Path) -> None:
    flags = ("--prompt", PROMPT, "--max-new-tokens=20")
    greedy = hysparse("generate", tiny_original, *flags)
    assert hysparse("generate", tiny_original, *flags, "--temperature=2").stdout != greedy.stdout


def test_what_the_user_got_wrong_is_one_line(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    empty = Path(shutil.copytree(tiny_checkpoint, tmp_path / "empty"))
    (empty / "chat_template.jinja").write_text("{{ none.of_these }}")
    (tiny_checkpoint / "chat_template.jinja").unlink()
    cases = [
        ((empty, "--prompt", PROMPT, "--chat"), 7, "makes no text"),
        ((tiny_checkpoint,), 3, "there is no prompt"),
        ((tiny_checkpoint, "--prompt", PROMPT, "--max-new-tokens=600"), 3, "512"),
        ((tiny_checkpoint, "--prompt", PROMPT, "--chat"), 3, "no chat template"),
        ((tiny_checkpoint / "none", "--prompt", PROMPT), 7, "none"),
    ]
    for args, exit_code, words in cases:
        run = hysparse("generate", *args)
        assert run.exit_code == exit_code, run.stderr
        assert len(run.stderr.splitlines()) == 1
        assert words in run.stderr
        assert run.stdout == ""
