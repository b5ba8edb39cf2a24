"""Chat templates are programs of strangers: they render, or say in one line why they don't."""

import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.texts.chat import render_chat
from tests.code_traps import TEMPLATES, put_template
from tests.conftest import Hysparse

CHAT = [{"role": "user", "content": "w1 w2"}]
PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
VARIABLES = {"bos_token": "<bos>", "add_generation_prompt": True}


def render(template: object) -> str:
    return next(render_chat(template, [CHAT], VARIABLES, "M"))


def test_one_process_renders_many_conversations_as_transformers_does(tiny_original: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_original, trust_remote_code=False)
    chats = [[{"role": "user", "content": f"w{i} \ud800 \u202e"}, *CHAT] for i in range(200)]
    whole = PLAIN + "{{ tools }}"
    assert list(render_chat(whole, chats, VARIABLES, "M")) == [
        tokenizer.apply_chat_template(chat, chat_template=whole, tokenize=False) for chat in chats
    ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "fails: roles must alternate"),
        ("{{ nobody.name }}", "'nobody' is undefined"),
        ("{{ a }}\n{% if %}", "line 2: Expected an expression"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% include 'x' %}", "no loader"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ 'x' * 3000000000 }}", "needs more than 1 GiB of memory"),
        ("{{ 'x' * 20000000 }}", "more than 16,777,216 characters"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nests too deeply"),
        (["a"], "is no text but a list"),
    ],
)
def test_a_template_that_fails_says_why(template: object, said: str) -> None:
    with pytest.raises(UnreadableInput) as error:
        render(template)
    assert said in str(error.value)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hysparse_cli.texts.chat.SECONDS", 1)
    begun = time.monotonic()
    with pytest.raises(UnreadableInput, match="may never end"):
        render(TEMPLATES["loop"])
    assert time.monotonic() - begun < 30


def test_after_a_conversation_that_fails_the_next_is_not_asked() -> None:
    rendered = render_chat("{{ messages[0].content / 2 }}", [CHAT, CHAT], {}, "M")
    with pytest.raises(UnreadableInput):
        next(rendered)
    assert list(rendered) == []


def test_generate_reports_a_template_and_encodes_special_tokens_once(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    args = ("generate", tiny_checkpoint, "--prompt", "w1", "--chat", "--json")
    put_template(tiny_checkpoint, TEMPLATES["refusal"], tmp_path)
    run = hysparse(*args)
    assert run.exit_code == 7
    assert run.stderr.endswith("fails: roles must\\x1b[31m alternate\n")
    put_template(tiny_checkpoint, "{{ bos_token }}{{ messages[0].content }}", tmp_path)
    run = hysparse(*args, "--max-new-tokens", 1)
    assert run.exit_code == 0 and '"prompt_tokens": 2' in run.stdout
