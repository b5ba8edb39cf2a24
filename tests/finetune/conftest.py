"""Text in the tiny checkpoint's vocabulary, and the tiny checkpoint converted."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Convert = Callable[..., Path]


@pytest.fixture
def documents_file(tmp_path: Path) -> Path:
    """40 documents of 3 to 60 words each, a loop of few words, so that there is much to learn."""
    draw = random.Random(0)
    texts = []
    for _ in range(40):
        loop = [f"w{draw.randrange(61)}" for _ in range(draw.randint(2, 5))]
        length = draw.randint(3, 60)
        texts.append(" ".join((loop * length)[:length]))
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def converted(tiny_original: Path, tmp_path: Path) -> Convert:
    """Converts the tiny checkpoint with small blocks; options as ``ConvertOptions`` takes them."""

    def make(**options: Any) -> Path:
        from hysparse_cli.convert.dense import read_dense
        from hysparse_cli.convert.plan import plan
        from hysparse_cli.convert.write import execute
        from hysparse_cli.files.source import locate
        from hysparse_cli.recipe import ConvertOptions

        small: dict[str, Any] = {
            "ratio": "1:2",
            "block_size": 4,
            "top_k_tokens": 16,
            "window_tokens": 8,
        }
        out = tmp_path / "converted"
        dense = read_dense(locate(str(tiny_original)))
        planned = plan(dense, ConvertOptions(**{**small, **options}))
        execute(planned, out, lambda done, total: None)
        return out

    return make
