"""The table of a saved state's tensors is a pickle: it may hold a table and nothing else."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.finetune.metadata import read_table
from hysparse_cli.finetune.state import read_tensors
from tests.code_traps import evil_pickle

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Change = Callable[[Metadata], None]


def tensors() -> dict[str, Any]:
    model = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    moments = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "optimizer": moments}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    save(tensors(), storage_writer=FileSystemWriter(tmp_path / "state"), no_dist=True)
    return tmp_path / "state"


def test_the_table_is_what_torch_reads(state: Path) -> None:
    table, torchs = read_table(state / ".metadata"), FileSystemReader(state).read_metadata()
    assert table.state_dict_metadata == torchs.state_dict_metadata
    assert table.storage_data == torchs.storage_data
    assert table.planner_data == torchs.planner_data


def test_tensors_come_back_as_they_were(state: Path) -> None:
    found = tensors()
    read_tensors(state, found)
    again = tensors()
    read_tensors(state, again)
    assert torch.equal(found["weights"]["weight"], again["weights"]["weight"])
    assert torch.equal(found["optimizer"]["bias"]["exp_avg"], again["optimizer"]["bias"]["exp_avg"])


PICKLES: dict[str, bytes] = {
    "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "import": b"cbuiltins\n__import__\n(S'own'\ntR.",
    "torch's own load": b"ctorch\nload\n(S'run.pt'\ntR.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0aos.system_\x93.",
    "a dtype's name": b"\x80\x04\x8c\x05torch\x8c\x07float32\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Pown\n.",
    "deep": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "many digits": b"I" + b"9" * 10_000 + b"\n.",
    "empty": b"",
}


@pytest.mark.parametrize("raw", PICKLES.values(), ids=PICKLES)
def test_another_pickle_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(UnreadableInput, match="metadata"):
        read_table(tmp_path / ".metadata")


def test_a_pickle_that_runs_something_does_not(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(evil_pickle(tmp_path / "sentinel"))
    with pytest.raises(UnreadableInput, match="system, which no saved state holds"):
        read_table(tmp_path / ".metadata")
    assert not (tmp_path / "sentinel").exists()


def _bytes_entry(table: Metadata) -> None:
    table.state_dict_metadata["weights.weight"] = BytesStorageMetadata()


def _elsewhere(table: Metadata) -> None:
    next(iter(table.storage_data.values())).relative_path = "../elsewhere"


def _transformed(table: Metadata) -> None:
    next(iter(table.storage_data.values())).transform_descriptors = ["stream.zstd"]


@pytest.mark.parametrize("change", [_bytes_entry, _elsewhere, _transformed])
def test_an_entry_that_is_no_tensor_of_this_folder_is_refused(state: Path, change: Change) -> None:
    table: Metadata = pickle.loads((state / ".metadata").read_bytes())
    change(table)
    (state / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(UnreadableInput, match=r"no table of tensors|BytesStorageMetadata"):
        read_tensors(state, tensors())


def test_tensors_that_are_pickles_run_nothing(state: Path, tmp_path: Path) -> None:
    for path in state.glob("*.distcp"):
        path.write_bytes(evil_pickle(tmp_path / "sentinel") * 100)
    with pytest.raises(UnreadableInput):
        read_tensors(state, tensors())
    assert not (tmp_path / "sentinel").exists()
