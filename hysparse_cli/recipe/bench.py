"""Options of ``hysparse bench``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hysparse_cli.recipe.fields import (
    CommaList,
    Count,
    Device,
    Dtype,
    FilePath,
    Flag,
    Help,
    ModelName,
    Positive,
    Ratio,
    Repeated,
    Section,
    Seed,
    SeveralTokens,
    Tokens,
    TrustRemoteCode,
)

Phase = Literal["memory", "prefill", "decode", "train"]
SubjectName = Literal["dense", "dense-cudnn", "dense-flash", "hybrid-swa", "hysparse"]
DENSE: dict[SubjectName, Literal["sdpa", "cudnn", "flash"]] = {
    "dense": "sdpa",
    "dense-cudnn": "cudnn",
    "dense-flash": "flash",
}


class BenchOptions(Section):
    """``hysparse bench``: memory, prefill, decode and training of a model beside its peers.

    Each phase is measured at each context and batch. A dense model is converted at ``ratio`` or
    ``pattern`` first. With random weights the lists that neighbouring tokens select share next to
    nothing, which is the worst case; "local" lists are shared about as far as a trained model's.
    """

    config: Annotated[
        ModelName | None,
        Flag(
            "Instead of a checkpoint: a folder, hub id, paper-7b or paper-80b-a3b, measured with "
            "random weights."
        ),
    ] = None
    random_weights: Annotated[bool, Flag("Of a checkpoint, use its config alone.")] = False
    ratio: Annotated[Ratio | None, Flag("Full to sparse layers of a dense model.", "1:3")] = None
    pattern: Annotated[str | None, Flag("One letter a layer: FSSSF...")] = None
    last_layer_full: Annotated[bool, Flag("With --ratio: the last layer.", "full")] = True
    block_size: Annotated[Positive, Help("Tokens in a selected block.")] = 64
    top_k_tokens: Annotated[Tokens, Help("Tokens that a sparse layer selects.")] = 1024
    window_tokens: Annotated[SeveralTokens, Help("Sliding window of a sparse layer.")] = 128
    subjects: Annotated[
        Annotated[CommaList[SubjectName], Field(min_length=1)] | None,
        Flag("Who takes part:", "all that suit the device"),
    ] = None
    against: Annotated[
        Repeated[ModelName],
        Flag("Another checkpoint to measure beside, with its own weights; may repeat."),
    ] = []
    phases: Annotated[CommaList[Phase], Field(min_length=1), Flag("What to measure:")] = [
        "memory",
        "prefill",
        "decode",
    ]
    context: Annotated[
        CommaList[SeveralTokens], Field(min_length=1), Flag("Lengths in tokens, such as 4k,32k.")
    ] = [512, 2048]
    batch: Annotated[
        CommaList[Positive], Field(min_length=1), Flag("Sequences at once, such as 1,16.")
    ] = [1]
    decode_tokens: Annotated[Tokens, Flag("Steps of decoding in each turn.")] = 16
    warmup: Annotated[Count, Flag("Turns to warm up.")] = 1
    repeat: Annotated[Positive, Flag("Measured turns.")] = 3
    gradient_checkpointing: Annotated[bool, Flag("train: compute activations twice.")] = False
    lists: Annotated[
        FilePath, Flag("Blocks that sparse layers read: own, local or a file of inspect-topk.")
    ] = "own"
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
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
