"""Writes the finetuned checkpoint, with new weights and all else as in the one it came from."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import GenerationConfig

from hysparse_cli.convert.card import UNTRAINED
from hysparse_cli.errors import HysparseError
from hysparse_cli.files.checkpoint import copy_side_files
from hysparse_cli.files.reading import read_json, read_yaml
from hysparse_cli.finetune.losses import LOSSES
from hysparse_cli.finetune.result import SCHEMA, FinetuneResult
from hysparse_cli.finetune.trainable import merged
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import FinetuneOptions, lasting, to_yaml
from hysparse_cli.recipe.finetune import Stage

RECIPE, REPORT = "hysparse_recipe.yaml", "hysparse_finetune.json"
CARD, CONVERSION = "README.md", "hysparse_report.json"


def write_checkpoint(
    folder: Path,
    checkpoint: str,
    weights: dict[str, Tensor],
    options: FinetuneOptions,
    result: FinetuneResult,
) -> None:
    """Write weights, config, tokenizer, the recipe so far and the report into ``folder``.

    Args:
        weights: those that were trained, adapters among them; rounded to the dtype that
            ``checkpoint`` is loaded in.
    """
    trusted = options.trust_remote_code
    loaded = load(checkpoint, dtype=options.dtype, device="cpu", trust_remote_code=trusted)
    loaded.model.load_state_dict(merged(weights, loaded.model, options), strict=False)
    # save_pretrained refuses a generation config with odd values, after the whole training
    loaded.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    loaded.model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    readable = (folder / "config.json").stat().st_mode
    for shard in folder.glob("*.safetensors"):
        shard.chmod(readable)  # safetensors makes its files private
    copy_side_files(loaded.folder, folder, with_code=trusted)
    if (loaded.folder / CONVERSION).is_file():
        shutil.copyfile(loaded.folder / CONVERSION, folder / CONVERSION)
    if (loaded.folder / CARD).is_file():
        card = (loaded.folder / CARD).read_text(encoding="utf-8", errors="replace")
        (folder / CARD).write_text(_trained(card, result), encoding="utf-8")
    (folder / RECIPE).write_text(_recipe(loaded.folder, options), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")


def result_in(out: Path) -> FinetuneResult | None:
    """The report of the finished run in the folder ``out``, if it holds one of this version."""
    report = out / REPORT
    content = read_json(report) if report.is_file() else None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    steps = content.get("steps")
    nested = [_nested(step) for step in steps] if isinstance(steps, list) else None
    try:
        found = TypeAdapter(FinetuneResult).validate_python(
            content | {"bad_rows": content.get("skipped_rows"), "steps": nested}
        )
    except ValidationError:
        return None
    stages = (*found.run.asked, *found.run.stages)
    known = all(set(s) == set(Stage.model_fields) and type(s["steps"]) is int for s in stages)
    return replace(found, out=out, finished_before=True) if known and found.steps else None


def _nested(step: Any) -> Any:
    """A step of the report, as ``Step`` has it."""
    if not isinstance(step, dict):
        return None
    return step | {"losses": {name: step[name] for name in LOSSES if name in step}}


def _trained(card: str, result: FinetuneResult) -> str:
    """The source's model card, which says so where it was trained since its conversion."""
    tokens = sum(step.tokens for step in result.steps)
    teacher = f" with {result.teacher} as teacher" if result.teacher else ""
    return card.replace(
        UNTRAINED,
        f"\n\nIt was trained on {tokens:,} tokens{teacher} since (`{REPORT}` has the losses).",
    )


def _recipe(source: Path, options: FinetuneOptions) -> str:
    """The recipe of the source's conversion, if it has one, with this run's section."""
    sections = yaml.safe_load(to_yaml(options))
    before: Any = None
    with suppress(HysparseError):  # one that can't be read must not cost the run
        before = read_yaml(source / RECIPE, "recipe")
    if isinstance(before, dict):
        kept = {name: lasting(part) for name, part in before.items() if isinstance(part, dict)}
        sections = kept | sections
    return yaml.safe_dump(sections, sort_keys=False)
