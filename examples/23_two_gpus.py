"""The same finetuning on one GPU and on two: are the losses the same, and how much faster is it?

    python examples/23_two_gpus.py two-gpus

makes a random qwen3 of 0.9B parameters that reads 32k tokens, converts it, and trains it for 12
steps of 4 rows of 32,768 tokens in bfloat16 with gradient checkpointing, the same rows in each
step. Tokens/s are of the steps from the third on, as the first two compile the kernels.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY, CONTEXT_TOKENS, DOCUMENTS, WARM_UP_STEPS = 16384, 32768, 60, 2
SIZES = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 28, "head_dim": 128}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}
TRAINING = ["--steps", "12", "--batch-size", "1", "--sequence-tokens", str(CONTEXT_TOKENS)]
for field in ("gradient_accumulation=4", "gradient_checkpointing=true", "shuffle_rows=1"):
    TRAINING += ["--set", f"finetune.{field}"]


def write_inputs(dense: str, text: str) -> None:
    words = {"<s>": 0, "</s>": 1, "<u>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<u>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(dense)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT_TOKENS, **SIZES, **HEADS}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).bfloat16().save_pretrained(dense)
    draw = random.Random(0)
    with open(text, "w") as file:
        for _ in range(DOCUMENTS):
            drawn = (f"w{draw.randrange(3, VOCABULARY)}" for _ in range(CONTEXT_TOKENS))
            file.write(json.dumps({"text": " ".join(drawn)}) + "\n")


def train(start: str, text: str, folder: Path, processes: int) -> dict[str, Any]:
    how = ["--data", text, *TRAINING, "--nproc-per-node", str(processes), "--overwrite", "--json"]
    command = ["hysparse", "finetune", start, str(folder / f"healed-{processes}"), *how]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dense, start, text = (str(folder / name) for name in ("dense", "start", "text.jsonl"))
    write_inputs(dense, text)
    subprocess.run(["hysparse", "convert", dense, start, "--overwrite"], check=True)
    runs = [train(start, text, folder, processes)["steps"] for processes in (1, 2)]
    apart = max(abs(one["loss"] - two["loss"]) for one, two in zip(*runs, strict=True))
    late = [run[WARM_UP_STEPS:] for run in runs]
    speeds = [sum(s["tokens"] for s in run) / sum(s["seconds"] for s in run) for run in late]
    print(f"losses at most {apart:.1e} apart; {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s")
