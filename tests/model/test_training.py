"""The model in other people's training code: a stock Trainer, peft, torch.compile."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.model.equivalences import SPEC, ids
from tests.model.tiny import hysparse_model


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = ids(index, batch=1)[0]
        return {"input_ids": row, "labels": row}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_stock_trainer_trains_it_with_checkpointing(tmp_path: Path) -> None:
    model = hysparse_model("qwen3", SPEC, torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    result = Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    assert result.training_loss > 0
    moved = [n for n, p in model.named_parameters() if not p.equal(before[n])]
    assert any("hysparse.gate.weight" in n for n in moved)
    assert any("hysparse.sinks" in n for n in moved)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_peft_trains_lora_and_keeps_the_hysparse_modules() -> None:
    model = hysparse_model("qwen3", SPEC, torch.float32)
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["hysparse"]),
    )
    x = ids()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=x, labels=x, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().item())
    assert losses[-1] < losses[0]
    wrapped = [m for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(wrapped) == len(SPEC.layers.sparse_layers)
    assert any("hysparse" in name for name in adapted.state_dict() if "modules_to_save" in name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_peft_adapter_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "o_proj"],
        modules_to_save=["hysparse"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(hysparse_model("qwen3", SPEC, torch.float32), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    x = ids()
    with torch.no_grad():
        expected = adapted(input_ids=x).logits
        assert not torch.allclose(hysparse_model("qwen3", SPEC, torch.float32)(x).logits, expected)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(hysparse_model("qwen3", SPEC, torch.float32), tmp_path)
    merged = again.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=x).logits, expected, rtol=1e-4, atol=1e-4)
    assert {n for n, _ in merged.named_parameters()} == {
        n for n, _ in hysparse_model("qwen3", SPEC).named_parameters()
    }


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_torch_compile_gives_the_same_loss_and_gradients() -> None:
    two = replace(SPEC, pattern="FS")
    model = hysparse_model("llama", two, torch.float32, num_hidden_layers=2).train()
    x = ids()
    plain = model(input_ids=x, labels=x, use_cache=False).loss
    plain.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=x, labels=x, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, gradient)
