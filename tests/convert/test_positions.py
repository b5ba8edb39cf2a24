"""A new rotary base and a longer input reach the model, in every form a config.json has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hysparse_cli.convert.positions import with_positions
from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import ConvertOptions
from tests.conftest import Hysparse
from tests.model.tiny import TINY, dense_config

NEW = ConvertOptions(rope_theta=640000.0, max_position_embeddings=32768)
RESCALED = {"apertus", "gpt_oss"}


def read(config: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**config)


@pytest.mark.parametrize("form", ["rope_parameters", "beside", "absent"])
@pytest.mark.parametrize("family", sorted(set(TINY) - RESCALED))
def test_every_family_reads_the_new_base(family: str, form: str) -> None:
    config = dense_config(family).to_dict()
    if form != "rope_parameters":
        rope = config.pop("rope_parameters")
        config |= {"partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)}
    if form == "beside":
        config["rotary_emb_base" if family == "gpt_neox" else "rope_theta"] = 10000.0
    before = read(config).rope_parameters
    after = read(with_positions(config, NEW))
    assert after.rope_parameters == before | {"rope_theta": 640000.0}
    assert after.max_position_embeddings == 32768


def test_a_base_for_each_layer_type_is_set_in_each() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    new = with_positions(config, ConvertOptions(rope_theta=5e5))
    assert [part["rope_theta"] for part in new["rope_parameters"].values()] == [5e5, 5e5]
    assert rope["rope_theta"] == 1e4
    assert with_positions(config, ConvertOptions()) is config


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_rescaled_positions_are_refused(where: str) -> None:
    config = {where: {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(UnsupportedModel, match=f"{where} of type 'yarn'"):
        with_positions(config, NEW)


def test_the_flags_reach_the_checkpoint_and_its_rotation(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    plain, new = tmp_path / "plain", tmp_path / "new"
    flags = ("--rope-theta", 640000, "--max-position-embeddings", 32768)
    assert hysparse("convert", tiny_original, plain, "--block-size", 8).exit_code == 0
    run = hysparse("convert", tiny_original, new, "--block-size", 8, *flags)
    assert run.exit_code == 0, run.stderr
    written = json.loads((new / "config.json").read_text())
    assert written["max_position_embeddings"] == 32768
    rotations = [load(str(folder)).model.model.rotary_emb.inv_freq for folder in (plain, new)]
    dims = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(rotations[0], 10000.0**-dims)
    torch.testing.assert_close(rotations[1], 640000.0**-dims)
