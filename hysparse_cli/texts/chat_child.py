"""Renders templates for chat.py in a process of its own: lines of JSON in, one out for each."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template


def limit(memory_bytes: int) -> None:
    """Let this process have so much more memory (on Linux) and write no file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        has = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + memory_bytes,) * 2)


def answer(conversation: Any, task: dict[str, Any]) -> dict[str, str]:
    """The text, or what went wrong."""
    try:
        texts = render_jinja_template(
            [conversation], chat_template=task["template"], **task["variables"]
        )[0]
        if len(texts[0]) > task["most_characters"]:
            return {"error": f"it makes more than {task['most_characters']:,} characters"}
        return {"text": texts[0]}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except TemplateError as error:  # also what raise_exception says
        return {"error": error.message or type(error).__name__}
    except MemoryError:
        return {"error": f"it needs more than {task['memory_bytes'] >> 30} GiB of memory"}
    except RecursionError:
        return {"error": "it nests too deeply"}
    except Exception as error:  # a template can raise any
        return {"error": f"{type(error).__name__}: {error}"}


def serve() -> None:
    """Answer each line of stdin on stdout."""
    task: dict[str, Any] = {}
    with os.fdopen(1, "w") as answers:
        for line in sys.stdin:
            asked = json.loads(line)
            if task:
                said = answer(asked, task)
            else:
                task, said = asked, {}
                limit(task["memory_bytes"])
            answers.write(json.dumps(said) + "\n")
            answers.flush()


serve()
