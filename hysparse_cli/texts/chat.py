"""Renders chat templates, which are programs that a checkpoint brings, each in its own process.

transformers' sandbox keeps them from Python's inside, not from running for ever or filling the
memory. The process (chat_child.py) imports no torch, takes one conversation at a time, and has
``SECONDS`` for each and ``MEMORY_BYTES`` for all.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hysparse_cli.errors import OutOfResources, UnreadableInput
from hysparse_cli.printable import single_line
from hysparse_cli.processes import running

SECONDS = 5
MEMORY_BYTES = 1 << 30  # beyond what the process has when it begins
MOST_CHARACTERS = 16 << 20  # of a rendered conversation
_START_SECONDS = 120

Conversation = Sequence[Mapping[str, Any]]


def render_chat(
    template: object,
    conversations: Iterable[Conversation],
    variables: Mapping[str, Any],
    where: str,
) -> Iterator[str]:
    """Each conversation's text; to be tokenized without special tokens, which it holds.

    Args:
        template: Jinja source, as of ``tokenizer.get_chat_template()``.
        conversations: messages, with "role" and "content"; any JSON.
        variables: what else the template may read: special tokens, ``add_generation_prompt``,
            ``tools``, ``documents``; any JSON.
        where: whose template it is, for messages.
    Raises: UnreadableInput with what the template says where it fails, runs too long or takes too
        much memory; OutOfResources where no process can be started.
    """
    if not isinstance(template, str):
        kind = type(template).__name__
        raise UnreadableInput(f"the chat template of {where} is no text but a {kind}")
    with _Renderer(where) as renderer:
        renderer.begin({"template": template, "variables": dict(variables)})
        for conversation in conversations:
            yield renderer.render(list(conversation))


class _Renderer:
    """The process; leaving the ``with`` block ends it."""

    def __init__(self, where: str):
        self.where = where
        self._process = subprocess.Popen(
            [sys.executable, *running("hysparse_cli.texts.chat_child")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "_Renderer":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, task: dict[str, Any]) -> None:
        limits = {"memory_bytes": MEMORY_BYTES, "most_characters": MOST_CHARACTERS}
        self._ask(task | limits, _START_SECONDS)

    def render(self, conversation: list[Mapping[str, Any]]) -> str:
        answer = self._ask(conversation, SECONDS)
        if "error" in answer:
            raise UnreadableInput(
                f"the chat template of {self.where} fails: {single_line(answer['error'])}"
            )
        text: str = answer["text"]
        return text

    def _ask(self, what: Any, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer: dict[str, Any] = json.loads(self._line(seconds))
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + seconds
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            if not select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
                if seconds == _START_SECONDS:
                    raise OutOfResources(f"no process for a chat template in {seconds} s")
                raise UnreadableInput(
                    f"the chat template of {self.where} took more than {seconds} s: it may never "
                    "end"
                )
            parts.append(os.read(pipe, 1 << 20))
            if not parts[-1]:
                raise self._died()
        return b"".join(parts)

    def _died(self) -> UnreadableInput:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return UnreadableInput(
            f"the chat template of {self.where} brought its process down ({how}): it nests too "
            f"deeply or needs more than {MEMORY_BYTES >> 30} GiB"
        )
