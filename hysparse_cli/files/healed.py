"""Whether a converted checkpoint has been trained since: until then it gives little but noise."""

from collections.abc import Sequence
from pathlib import Path

from hysparse_cli.files.reading import read_json
from hysparse_cli.files.source import locate
from hysparse_cli.pattern import names_sparse
from hysparse_cli.printable import printable

CONVERTED, FINETUNED = "hysparse_report.json", "hysparse_finetune.json"


def is_unhealed(folder: Path) -> bool:
    """``convert`` leaves a report in its folder; ``finetune`` adds its own. What a stock Trainer
    saves has neither, and is taken for trained, as weights tell nothing of a fitted start."""
    if not (folder / CONVERTED).is_file() or (folder / FINETUNED).exists():
        return False
    config = read_json(folder / "config.json")
    section = config.get("hysparse") if isinstance(config, dict) else None
    return isinstance(section, dict) and names_sparse(section.get("pattern"))


def hints(checkpoints: Sequence[str]) -> list[str]:
    """A line for each checkpoint, a folder or hub id, that is converted and not healed."""
    return [
        f"{printable(checkpoint)} is converted but not healed, so its answers are poor: hysparse "
        "finetune heals it"
        for checkpoint in checkpoints
        if is_unhealed(locate(checkpoint, trust_remote_code=True).folder)  # nothing is run here
    ]
