"""Malformed checkpoints by the hundred."""

import json
from pathlib import Path

from tests.long.case import Case
from tests.long.config_faults import config_cases, generation_cases, tokenizer_cases
from tests.long.file_faults import file_cases, folder_cases, side_cases
from tests.long.shard_faults import header_cases, index_cases


def all_cases(folder: Path) -> list[Case]:
    """Every case there is for a checkpoint like the one in ``folder``."""
    read = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("config", "tokenizer")}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = sorted(path.name for path in folder.iterdir() if path.name != "chat_template.jinja")
    return [
        *config_cases(read["config"]),
        *file_cases(names),
        *header_cases(),
        *index_cases(),
        *tokenizer_cases(settings, read["tokenizer"]),
        *generation_cases(),
        *side_cases(),
        *folder_cases(),
    ]
