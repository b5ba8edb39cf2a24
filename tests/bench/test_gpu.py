"""hysparse bench on a CUDA device: graphs compute what eager steps do, and every phase runs."""

import json
from pathlib import Path

import pytest
import torch

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.decode import Decoding, _graph_of
from hysparse_cli.bench.subjects import subjects_of
from hysparse_cli.bench.weights import Weights
from hysparse_cli.model.attention import DENSE_NAME
from hysparse_cli.recipe import BenchOptions
from tests.conftest import Hysparse
from tests.model.tiny import dense_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SPARSE = {"block_size": 16, "top_k_tokens": 32, "window_tokens": 32}
SUBJECTS = ["dense-cudnn", "dense-flash", "hybrid-swa", "hysparse"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    dense_config("qwen3", **SIZES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", [0, 3])
@torch.inference_mode()
def test_a_graph_decodes_what_eager_steps_do(config: Path, which: int) -> None:
    options = BenchOptions(config=str(config), context=[200], **SPARSE)  # type: ignore[arg-type]
    subject = subjects_of(None, options, on_cuda=True)[which]
    device = torch.device("cuda")
    model = Weights(subject, "bfloat16", device, 0).model
    AttentionPart(subject.backend).attach(model)
    eager, replayed = (Decoding(model, 200, 2, seed=1) for _ in range(2))
    run = _graph_of(replayed.step, replayed.rewind, device)
    run()
    for _ in range(3):  # one to load what is loaded at first, one replay in _graph_of, and run
        eager.step()
        eager.rewind()
    assert replayed.ids.equal(eager.ids)
    assert (model.config._attn_implementation == DENSE_NAME) == subject.is_dense


def test_every_phase_of_every_subject(hysparse: Hysparse, config: Path, tmp_path: Path) -> None:
    sparse = [word for name, n in SPARSE.items() for word in ("--set", f"bench.{name}={n}")]
    # at shorter contexts so many tiny sequences fit that cuDNN can't take a step of them at once
    phases = ("--phases", "memory,prefill,decode,train", "--context", "4k", "--batch", "2")
    quick = ("--repeat", 1, "--decode-tokens", 4, "--gradient-checkpointing", "--dtype", "bfloat16")
    args = ("bench", "--config", config, *phases, *quick, *sparse, "--output", tmp_path / "out")
    run = hysparse(*args, "--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    assert [(row["subject"], row["error"]) for row in result["rows"]] == 4 * [
        (subject, None) for subject in SUBJECTS
    ]
    for row in result["rows"]:
        assert row["peak_memory_bytes"] > 0
        if row["phase"] == "memory":
            assert row["kv_bytes"] == row["arithmetic_kv_bytes"]
            assert row["largest_batch"] > 0 and row["largest_batch_is"] == "confirmed"
        else:
            assert row["median_attention_ms"] > 0 and row["fraction_of_floor"] > 0
    assert result["environment"]["driver"] and result["environment"]["clocks"][0]["sm_clock_mhz"]
