"""A converted checkpoint that was never trained says so where its quality is looked at."""

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from hysparse_cli.files.healed import is_unhealed
from tests.conftest import Hysparse

HINT = "is converted but not healed"


def test_an_unhealed_checkpoint_is_named_on_stderr(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path
) -> None:
    said = hysparse("generate", tiny_converted, "--prompt", "w1", "--max-new-tokens", 2)
    assert said.exit_code == 0 and said.stderr.count(HINT) == 1 and HINT not in said.stdout
    both = hysparse("eval", tiny_original, tiny_converted, "--retrieval-tokens", 400)
    assert both.exit_code == 0 and both.stderr.count(HINT) == 1
    assert f"{tiny_converted} {HINT}" in both.stderr
    looked = hysparse("inspect-topk", tiny_converted, "--json")
    assert looked.exit_code == 0 and looked.stderr.count(HINT) == 1


def test_what_was_trained_or_has_no_sparse_layer_is_not_named(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path, tmp_path: Path
) -> None:
    assert is_unhealed(tiny_converted) and not is_unhealed(tiny_original)
    full = tmp_path / "full"
    assert hysparse("convert", tiny_original, full, "--layout", "full").exit_code == 0
    assert not is_unhealed(full)
    AutoModelForCausalLM.from_pretrained(tiny_converted).save_pretrained(tmp_path / "trainers")
    assert not is_unhealed(tmp_path / "trainers")
    finetuned = Path(shutil.copytree(tiny_converted, tmp_path / "finetuned"))
    (finetuned / "hysparse_finetune.json").write_text("{}")
    assert not is_unhealed(finetuned)
