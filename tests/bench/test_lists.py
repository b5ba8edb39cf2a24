"""Block lists to measure with: a file's, tiled to length, and made-up ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hysparse_cli.bench import lists
from hysparse_cli.errors import InvalidRecipe, UnreadableInput


@pytest.fixture
def tiny_lists(tmp_path: Path) -> Path:
    """Two layers' lists of one text of 24 tokens: every block up to the query's own, latest two."""
    own = torch.arange(24) // 8
    both = torch.stack([own - 1, own], dim=-1)
    both[own == 0] = torch.tensor([0, -1])
    layer = both[:, None].expand(24, 2, 2).int().contiguous()
    path = tmp_path / "lists.safetensors"
    save_file({"layer.0": layer, "layer.4": layer.clone()}, path, metadata={"block_size": "8"})
    return path


def test_real_lists_are_tiled_to_length(tiny_lists: Path) -> None:
    tiled = lists.read_lists(tiny_lists, 60, 3, 2, 8)
    assert tiled.shape == (1, 60, 3, 2) and tiled.dtype == torch.int32
    own = torch.arange(60) // 8
    assert torch.equal(tiled[0, :, 2].amax(-1).long(), own)  # each among its own blocks
    assert tiled[0, 30].tolist() == [[3, -1]] * 3  # the file's first block, its second time


def test_lists_of_other_sizes_are_refused(tiny_lists: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="block_size 8 and top_k_tokens 16"):
        lists.read_lists(tiny_lists, 60, 3, 16, 64)
    other = tmp_path / "other.safetensors"
    save_file({"layer.0": torch.zeros(3)}, other)
    with pytest.raises(UnreadableInput, match="inspect-topk --lists"):
        lists.read_lists(other, 60, 3, 2, 8)


@pytest.mark.parametrize("make", [lists.random_lists, lists.local_lists])
def test_made_up_lists_are_distinct_visible_and_padded_at_the_end(make: Any) -> None:
    made = make(100, 3, 4, 8, torch.Generator().manual_seed(0))
    assert made.shape == (1, 100, 3, 4) and made.dtype == torch.int32
    own = (torch.arange(100) // 8)[None, :, None]
    assert (made <= own[..., None]).all()
    assert torch.equal((made >= 0).sum(-1), (own + 1).clamp(max=4).expand(1, 100, 3))
    for row in made[0].flatten(0, 1).tolist():
        ids = [n for n in row if n >= 0]
        assert ids == sorted(set(ids)) and row == ids + [-1] * (4 - len(ids))


def test_pairs_are_counted_as_seen() -> None:
    block_idx = torch.tensor([[[[0, -1]], [[0, -1]], [[0, 1]]]], dtype=torch.int32)
    assert lists.pairs_of(block_idx, 2) == 1 + 2 + (2 + 1)
