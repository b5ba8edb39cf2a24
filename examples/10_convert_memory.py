"""Peak memory and speed of `hysparse convert` on a synthetic dense checkpoint of any size.

    python examples/10_convert_memory.py /tmp --gib 4 --shards 16

Takes turns under the given folder: cp -r, cp -r and sync, convert (which syncs). Wants twice the
size on disk; everything it wrote is removed at the end.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def write_dense(folder: Path, gib: float, shards: int) -> None:
    """A llama of ``gib`` GiB in bfloat16, two layers a shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = 1024, 2 * shards
    mlp = gib * 2**30 / 2 / layers - 4 * hidden**2
    sizes = {"hidden_size": hidden, "intermediate_size": int(mlp / 3 / hidden) // 64 * 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, **sizes))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder, max_shard_size=int(gib * 2**30 / shards * 1.01))


def timed(*command: str) -> tuple[float, float]:
    """Seconds and peak resident MB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    scratch = args.folder / "hysparse-convert-memory"
    dense, copied, out = (str(scratch / name) for name in ("dense", "copied", "out"))
    commands = {
        "cp -r": ("cp", "-r", dense, copied),
        "cp -r; sync": ("sh", "-c", f"cp -r {dense} {copied} && sync"),
        "convert": ("hysparse", "convert", dense, out),
    }
    try:
        write = (Path(dense), args.gib, args.shards)
        writer = multiprocessing.get_context("spawn").Process(target=write_dense, args=write)
        writer.start()
        writer.join()
        for _ in range(args.rounds):
            for name, command in commands.items():
                os.sync()
                seconds, peak = timed(*command)
                print(f"{name:12} {seconds:6.1f} s, peak {peak:5.0f} MB", flush=True)
                shutil.rmtree(command[-1] if name == "convert" else copied)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
