"""Options of ``hysparse bench``."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hysparse_cli.recipe.fields import Device, Dtype, FilePath, ModelName, Positive, Section, Seed

Phase = Literal["memory", "prefill", "decode", "train"]
SubjectName = Literal["dense", "dense-cudnn", "dense-flash", "hybrid-swa", "hysparse"]
DENSE: dict[SubjectName, Literal["sdpa", "cudnn", "flash"]] = {
    "dense": "sdpa",
    "dense-cudnn": "cudnn",
    "dense-flash": "flash",
}


class BenchOptions(Section):
    """``hysparse bench``: memory, prefill, decode and training of a model beside its peers.

    ``config`` is a folder, a hub id or a name of bench/presets.py, measured with random weights and
    converted at ``ratio`` or ``pattern``, 1:3 by default. ``random_weights`` measures a checkpoint
    so, too. ``subjects`` is who takes part: by default dense attention (on a GPU by cuDNN and by
    FlashAttention 2), hybrid SWA and HySparse. ``against`` are other checkpoints, with their own
    weights.

    Each phase is measured at each context and batch, ``warmup`` and then ``repeat`` times;
    ``decode_tokens`` is how many steps of decoding each time. ``lists`` says which blocks sparse
    layers read in prefill and training: "own" are those that the model selects (with random weights
    neighbouring tokens then share next to none, the worst case), "local" are made up, shared by
    neighbours about as far as a trained model's, or a file of ``inspect-topk --lists``.
    """

    config: ModelName | None = None
    random_weights: bool = False
    ratio: str | None = None
    pattern: str | None = None
    last_layer_full: bool = True
    block_size: Positive = 64
    top_k_tokens: Positive = 1024
    window_tokens: Annotated[int, Field(gt=1)] = 128
    subjects: Annotated[list[SubjectName], Field(min_length=1)] | None = None
    against: list[ModelName] = []
    phases: Annotated[list[Phase], Field(min_length=1)] = ["memory", "prefill", "decode"]
    context: Annotated[list[Annotated[int, Field(gt=1)]], Field(min_length=1)] = [512, 2048]
    batch: Annotated[list[Positive], Field(min_length=1)] = [1]
    decode_tokens: Positive = 16
    warmup: Annotated[int, Field(ge=0)] = 1
    repeat: Positive = 3
    gradient_checkpointing: bool = False
    lists: FilePath = "own"
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> "BenchOptions":
        if self.top_k_tokens % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} does not divide top_k_tokens {self.top_k_tokens}"
            )
        if self.ratio is not None and self.pattern is not None:
            raise ValueError("ratio and pattern both place the full layers: give one")
        return self


class KernelBenchOptions(Section):
    """``hysparse bench kernels``: the attention ops on random inputs, beside other people's.

    ``heads`` are query and KV heads; decode takes the first. ``lists`` is a file of ``inspect-topk
    --lists``; where there is none, lists are made up. Each measurement takes about ``measure_ms``.
    """

    context: list[Positive] = [8192, 32768]
    ops: Annotated[
        list[Literal["full", "block-sparse", "window", "layer", "decode"]], Field(min_length=1)
    ] = ["full", "block-sparse", "window", "layer", "decode"]
    heads: Annotated[list[str], Field(min_length=1)] = ["32/8", "64/4"]
    head_dim: Positive = 128
    block_size: Positive = 64
    top_k_tokens: Positive = 1024
    window_tokens: Positive = 128
    decode_batch: list[Positive] = [1, 16, 64]
    decode_context: Annotated[int, Field(gt=1)] = 32768
    lists: FilePath | None = None
    measure_ms: Positive = 100
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Device = "auto"
    seed: Seed = 0

    @property
    def head_counts(self) -> list[tuple[int, int]]:
        """Query and KV heads."""
        return [(int(h), int(g)) for h, g in (pair.split("/") for pair in self.heads)]

    @property
    def top_k_blocks(self) -> int:
        """Blocks selected for each query."""
        return self.top_k_tokens // self.block_size

    @model_validator(mode="after")
    def _consistent(self) -> "KernelBenchOptions":
        if self.top_k_tokens % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} does not divide top_k_tokens {self.top_k_tokens}"
            )
        for pair in self.heads:
            if not re.fullmatch(r"[1-9][0-9]*/[1-9][0-9]*", pair):
                raise ValueError(f"heads {pair!r} are not query and KV heads such as 32/8")
        for heads, kv_heads in self.head_counts:
            if heads % kv_heads:
                raise ValueError(f"heads {heads}/{kv_heads}: {kv_heads} does not divide {heads}")
        return self
