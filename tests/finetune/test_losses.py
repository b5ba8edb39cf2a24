from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.data import IGNORED, PackedRows, own_batches
from hysparse_cli.finetune.losses import count_targets, distill_sums, next_token_sums
from hysparse_cli.model import losses
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import FinetuneOptions
from tests.finetune.conftest import Convert

Batch = dict[str, torch.Tensor]


@pytest.fixture(params=["dense", "hysparse", "hybrid-swa"])
def model(request: pytest.FixtureRequest, tiny_original: Path, converted: Convert) -> Any:
    folder = tiny_original if request.param == "dense" else converted(layout=request.param)
    return load(str(folder)).model.double()


@pytest.fixture
def teacher(tiny_original: Path) -> Any:
    model = load(str(tiny_original)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.requires_grad_(False).double()


@pytest.fixture
def batch(documents_file: Path, tiny_original: Path) -> Batch:
    options = FinetuneOptions(data=str(documents_file), sequence_tokens=48)
    rows = islice(PackedRows(options, load(str(tiny_original)).tokenizer), 3)
    return next(own_batches(list(rows), 0, 1, 3))


def plain_losses(model: Any, teacher: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sums from whole logits, document by document, each run alone."""
    next_token = distill = torch.zeros(())
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [*torch.where(positions == 0)[0].tolist(), len(ids)]
        for begin, end in pairwise(starts):
            document = ids[None, begin:end]
            log_p = model(document).logits[0, :-1].log_softmax(-1)
            log_q = teacher(document).logits[0, :-1].log_softmax(-1)
            next_token = next_token + functional.nll_loss(log_p, document[0, 1:], reduction="sum")
            distill = distill + (log_q.exp() * (log_q - log_p)).sum()
    return next_token, distill


@pytest.mark.parametrize("chunk_targets", [7, 10_000])
def test_losses_and_gradients_of_packed_chunks_are_those_of_separate_documents(
    model: Any, teacher: Any, batch: Batch, chunk_targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_targets * model.config.vocab_size)
    sums = distill_sums(model, LocalBatch(batch), teacher, distill_weight=0.75, hidden_weight=0.0)
    expected = plain_losses(model, teacher, batch)
    # logits become float32, which is where the difference comes from
    torch.testing.assert_close(
        sums.measured["next_token_loss"].double(), expected[0], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        sums.measured["distill_loss"].double(), expected[1], rtol=1e-4, atol=0
    )
    parameters = list(model.parameters())
    ours = torch.autograd.grad(sums.total, parameters, allow_unused=True)
    theirs = torch.autograd.grad(
        0.25 * expected[0] + 0.75 * expected[1], parameters, allow_unused=True
    )
    scale = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
    for gradient, reference in zip(ours, theirs, strict=True):
        if reference is None:
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * scale)


def test_without_a_teacher_only_the_next_token_counts(model: Any, batch: Batch) -> None:
    sums = next_token_sums(model, LocalBatch(batch))
    assert sums.measured == {"next_token_loss": sums.total}


def test_targets_are_the_tokens_that_have_another_before_them_in_their_document(
    batch: Batch,
) -> None:
    assert count_targets(batch) == int((batch["position_ids"] > 0).sum())
    nothing = {name: torch.full_like(tensor, IGNORED) for name, tensor in batch.items()}
    assert count_targets(nothing) == 0


def test_whole_logits_are_never_kept(
    model: Any, teacher: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 8 * vocabulary)
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        if tensor.shape[-1] == vocabulary and tensor.dim() > 1:
            largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sums = distill_sums(
            model, LocalBatch(batch), teacher, distill_weight=0.5, hidden_weight=0.5
        )
        torch.autograd.backward(sums.total)
    assert largest <= 8 * vocabulary < count_targets(batch) * vocabulary
