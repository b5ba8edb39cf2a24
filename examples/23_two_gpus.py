"""The same finetuning on one GPU and on two: are the losses the same, and how much faster is it?

    python examples/23_two_gpus.py two-gpus
    python examples/23_two_gpus.py long-rows --split

makes a random qwen3 of 0.9B parameters, converts it, and trains it for 12 steps in bfloat16 with
gradient checkpointing: the GPUs share 4 rows of 32,768 tokens, or with --split both have a half of
each row of 131,072, 6 steps. Speed is of the steps from the third on: the first compile kernels.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

SPLIT = "--split" in sys.argv
ROWS, ROW_TOKENS = (1, 131072) if SPLIT else (4, 32768)
VOCABULARY, STEPS = 16384, 6 if SPLIT else 12
SIZES = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 28, "head_dim": 128}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}
TRAINING = ["--steps", str(STEPS), "--batch-size", "1", "--sequence-tokens", str(ROW_TOKENS)]
for field in (f"gradient_accumulation={ROWS}", "gradient_checkpointing=true", "shuffle_rows=1"):
    TRAINING += ["--set", f"finetune.{field}"]


def write_inputs(dense: str, text: str) -> None:
    words = {"<s>": 0, "</s>": 1, "<u>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<u>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(dense)
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": ROW_TOKENS, **SIZES, **HEADS}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).bfloat16().save_pretrained(dense)
    texts = (" ".join(random.choices([*words][3:], k=ROW_TOKENS)) for _ in range(STEPS * ROWS))
    Path(text).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train(start: str, text: str, out: str, processes: int) -> list[dict[str, Any]]:
    how = ["--nproc-per-node", str(processes), "--overwrite", "--json", "--data", text, *TRAINING]
    how += ["--set", f"finetune.sequence_parallel_size={processes if SPLIT else 1}"]
    command = ["hysparse", "finetune", start, f"{out}-{processes}", *how]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["steps"]


if __name__ == "__main__":
    dense, start, text, out = (f"{sys.argv[1]}/{n}" for n in ("dense", "start", "t.jsonl", "out"))
    write_inputs(dense, text)
    subprocess.run(["hysparse", "convert", dense, start, "--overwrite"], check=True)
    runs = [train(start, text, out, processes) for processes in (1, 2)]
    apart = max(abs(one["loss"] - two["loss"]) for one, two in zip(*runs, strict=True))
    print(f"losses at most {apart:.1e} apart")
    for run in runs:
        speed = sum(s["tokens"] for s in run[2:]) / sum(s["seconds"] for s in run[2:])
        print(f"{speed:,.0f} tokens/s, {run[-1]['peak_memory_bytes'] / 1e9:.1f} GB at most")
