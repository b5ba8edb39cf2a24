"""Peak memory and speed of `hysparse convert` on a synthetic dense checkpoint, beside cp -r.

    python examples/10_convert_memory.py /tmp 4

writes 4 GiB in 16 shards under /tmp (twice that in all), and removes it at the end. The dry run
reads headers and checks them: its time is start-up, whatever the size of the checkpoint.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHARDS, ROUNDS = 16, 3


def write_dense(folder: Path, gib: float) -> None:
    """A llama of ``gib`` GiB in bfloat16, two layers a shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = 1024, 2 * SHARDS
    mlp = gib * 2**30 / 2 / layers - 4 * hidden**2
    sizes = {"hidden_size": hidden, "intermediate_size": int(mlp / 3 / hidden) // 64 * 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, **sizes))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder, max_shard_size=int(gib * 2**30 / SHARDS * 1.01))


if __name__ == "__main__":
    scratch = Path(sys.argv[1]) / "hysparse-convert-memory"
    dense, copied, out = (str(scratch / name) for name in ("dense", "copied", "out"))
    commands = {
        "cp -r": ["cp", "-r", dense, copied],
        "cp -r; sync": ["sh", "-c", f"cp -r {dense} {copied} && sync"],
        "convert --dry-run": ["hysparse", "convert", dense, out, "--dry-run"],
        "convert": ["hysparse", "convert", dense, out],
    }
    size = (Path(dense), float(sys.argv[2]))
    writer = multiprocessing.get_context("spawn").Process(target=write_dense, args=size)
    writer.start()
    writer.join()
    for _ in range(ROUNDS):
        for name, command in commands.items():
            os.sync()
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds, peak_mb = time.perf_counter() - start, usage.ru_maxrss / 1e3
            print(f"{name:18} {seconds:5.1f} s, peak {peak_mb:4.0f} MB, exit {status}", flush=True)
            for folder in (copied, out):
                shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(scratch)
