"""How transformers finds a converted checkpoint, in fresh processes, as a user's would be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.modeling import make_sparse
from tests.model.equivalences import SPEC
from tests.model.tiny import dense_config, hysparse_model

LOAD = "m = AutoModelForCausalLM.from_pretrained(path{options}); print(type(m).__name__)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted")
    hysparse_model("qwen3", SPEC, torch.float32).save_pretrained(path)
    return path


def run(code: str, path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    program = f"path = {str(path)!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import hysparse_cli\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport hysparse_cli",
    ],
)
def test_importing_hysparse_cli_is_enough(imports: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run(f"{imports}\n{LOAD.format(options='')}", checkpoint, tmp_path)
    assert result.stdout.strip() == "HySparseQwen3ForCausalLM", result.stderr


def test_trust_remote_code_finds_the_installed_package(checkpoint: Path, tmp_path: Path) -> None:
    load = LOAD.format(options=", trust_remote_code=True")
    result = run(f"from transformers import AutoModelForCausalLM\n{load}", checkpoint, tmp_path)
    assert result.stdout.strip() == "HySparseQwen3ForCausalLM", result.stderr


def test_it_never_loads_as_the_dense_model(checkpoint: Path, tmp_path: Path) -> None:
    load = LOAD.format(options="")
    result = run(f"from transformers import AutoModelForCausalLM\n{load}", checkpoint, tmp_path)
    assert result.returncode != 0 and "ForCausalLM" not in result.stdout
    assert "trust_remote_code" in result.stderr


def test_importing_hysparse_cli_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = "import hysparse_cli, sys; print({'torch', 'transformers'} & set(sys.modules))"
    assert run(code, tmp_path, tmp_path).stdout.strip() == "set()"


def test_a_newer_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["hysparse"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"version in config\.json is 99.*install a newer"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_user_given_attention_implementation_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="'eager' can't run HySparse layers"):
        AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")


def test_in_memory_the_model_type_stays_the_base_familys(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.model_type == "qwen3"
    assert config.to_dict()["model_type"] == "hysparse"
    again = type(config).from_dict(config.to_dict())
    assert again.hysparse == config.hysparse and again.layer_types == config.layer_types


def test_its_own_config_class_reads_it_without_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    """As peft does, where it saves an adapter."""
    code = "import hysparse_cli\nfrom transformers import AutoConfig\n"
    code += "kind = type(AutoConfig.from_pretrained(path))\n"
    code += "print(kind.from_pretrained(path).hysparse['pattern'])"
    result = run(code, checkpoint, tmp_path)
    assert result.stdout.strip() == SPEC.pattern and "model of type" not in result.stderr


def test_layer_types_make_the_caches(checkpoint: Path) -> None:
    assert AutoConfig.from_pretrained(checkpoint).layer_types == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert set(HysparseSpec("FSSFS", sparse_kv="own").layer_types) == {"full_attention"}


def starts(model: Any) -> bool:
    """Whether the new tensors are at the values that a conversion gives them."""
    new = {n: p for n, p in model.named_parameters() if ".hysparse." in n}
    return bool(new) and all(p.eq(-10 if n.endswith("sinks") else 0).all() for n, p in new.items())


def test_a_model_of_a_config_alone_begins_as_a_converted_one(checkpoint: Path) -> None:
    assert starts(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint)))


def test_new_tensors_that_a_checkpoint_lacks_get_their_start_and_the_others_are_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    lacking = tmp_path / "lacking"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tensors = model.state_dict()
    for name in tensors:
        if ".hysparse." in name:
            tensors[name] = torch.full_like(tensors[name], 0.5)
    read = "model.layers.1.self_attn.hysparse.sinks"
    kept = {n: x for n, x in tensors.items() if ".hysparse." not in n or n == read}
    model.save_pretrained(lacking, state_dict=kept)
    loaded = AutoModelForCausalLM.from_pretrained(lacking)
    found = loaded.get_parameter(read)
    assert found.eq(0.5).all()
    torch.nn.init.constant_(found, -10.0)
    assert starts(loaded)


def test_a_dense_model_made_sparse_keeps_its_rotary_frequencies() -> None:
    model = AutoModelForCausalLM.from_config(dense_config("qwen3"), dtype=torch.bfloat16)
    before = model.model.rotary_emb.inv_freq.clone()
    make_sparse(model, SPEC)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    new = [p for n, p in model.named_parameters() if ".hysparse." in n]
    assert starts(model) and {p.dtype for p in new} == {torch.bfloat16}
