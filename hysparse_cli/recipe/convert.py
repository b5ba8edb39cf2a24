"""Options of ``hysparse convert``."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hysparse_cli.model.config import SparseKv, WindowKv, check_switches
from hysparse_cli.model.kinds import LayoutName
from hysparse_cli.placement.strategies import STRATEGIES
from hysparse_cli.recipe.fields import (
    TEXT_FILE,
    CommaList,
    Device,
    Dtype,
    FilePath,
    Flag,
    Help,
    Overwrite,
    Positive,
    Ratio,
    Real,
    Section,
    Seed,
    SeveralTokens,
    Size,
    Text,
    TextField,
    Tokens,
    TrustRemoteCode,
    integer,
)

if TYPE_CHECKING:
    Strategy = str
else:
    Strategy = Literal[("uniform", "manual", *STRATEGIES)]
Init = Literal["constant", "copy", "aligned"]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]


def _swaps(value: object) -> object:
    """Pairs of layers written as ``8:9,10:11``, or a list of ``8:9``, as numbers."""
    if value == "auto" or not isinstance(value, (str, list)):
        return value
    pairs = value.split(",") if isinstance(value, str) else value
    for pair in pairs:
        if isinstance(pair, str) and not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", pair):
            raise ValueError("neither auto nor pairs of layers such as 8:9,10:11")
    return [[int(n) for n in pair.split(":")] if isinstance(pair, str) else pair for pair in pairs]


Layer = Annotated[int, Text("int", integer)]
Swaps = Annotated[Literal["auto"] | list[Pair], Text("a:b"), BeforeValidator(_swaps)]


class ConvertOptions(Section):
    """``hysparse convert``: where the full layers go, the sizes, and what is written how.

    ``pattern`` or ``full_layers`` (strategy "manual") say where the full layers are; ``ratio`` or
    ``fit`` say how many, and ``strategy`` chooses them: "uniform" as the paper does, the others
    measure the model on calibration text first. Where nothing is given, the ratio is 1:3 and the
    strategy uniform. ``sparse_kv`` and ``window_kv`` are the ablations of the paper's Table 4.
    """

    layout: Annotated[LayoutName, Flag("Kind of layout:")] = "hysparse"
    ratio: Annotated[Ratio | None, Flag("Full to sparse layers.", "1:3")] = None
    strategy: Annotated[Strategy | None, Flag("What chooses the full layers:", "uniform")] = None
    fit: Annotated[Size | None, Flag("Memory for weights and KV cache, such as 24GiB.")] = None
    context: Annotated[
        Tokens | None, Flag("With --fit: tokens a sequence, such as 32k.", "the model's")
    ] = None
    batch: Annotated[Positive | None, Flag("With --fit: sequences.", "1")] = None
    calibration: Annotated[FilePath | None, Flag(f"{TEXT_FILE}, to measure on.", "made up")] = None
    calibration_text_field: TextField = "text"
    calibration_tokens: Annotated[Tokens, Flag("Tokens to measure on.")] = 16384
    calibration_sequence_tokens: Annotated[
        SeveralTokens | None, Help("Tokens of each text to measure on.", "twice top_k_tokens")
    ] = None
    scores: Annotated[
        FilePath | None, Flag("File that keeps what is measured.", "OUT.scores.json")
    ] = None
    pattern: Annotated[str | None, Flag("One letter a layer: FSSSF...")] = None
    full_layers: Annotated[
        CommaList[Layer] | None, Flag("Layers that are full, such as 0,4,8,11.")
    ] = None
    last_layer_full: Annotated[
        bool, Flag("With --ratio and --full-layers: the last layer.", "full")
    ] = True
    top_k_tokens: Annotated[Tokens, Flag("Tokens that a sparse layer selects.")] = 1024
    block_size: Annotated[Positive, Flag("Tokens in a selected block.")] = 64
    window_tokens: Annotated[SeveralTokens, Flag("Sliding window of a sparse layer.")] = 128
    rope_theta: Annotated[
        Annotated[Real, Field(gt=0, le=1e15)] | None,
        Flag("New base of the rotary embedding, to heal a longer context."),
    ] = None
    max_position_embeddings: Annotated[
        Tokens | None, Flag("New longest input in tokens, to be healed at.")
    ] = None
    sparse_kv: Annotated[SparseKv, Help("Whose keys and values the block-sparse branch reads:")] = (
        "shared"
    )
    window_kv: Annotated[
        WindowKv, Help("Whose keys and values the SWA branch reads, or none to leave it out:")
    ] = "own"
    swap_attention: Annotated[
        Swaps | None,
        Flag("Layers whose attention trades places: 8:9, or auto.", "none"),
    ] = None
    init: Annotated[Init, Flag("How new layers start:")] = "constant"
    explain: Annotated[bool, Flag("Measure what each mechanism costs.")] = False
    explain_tokens: Annotated[
        Tokens, Help("Tokens of the calibration text that explain reads, many times.")
    ] = 8192
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_shard_size: Annotated[Size, Flag("Largest file of weights.")] = "5GB"
    revision: Annotated[str | None, Flag("Branch, tag or commit of a hub id.")] = None
    trust_remote_code: TrustRemoteCode = False
    overwrite: Overwrite = False
    seed: Seed = 0

    @property
    def measures(self) -> bool:
        """Whether the strategy measures the model."""
        return self.strategy in STRATEGIES

    @model_validator(mode="after")
    def _consistent(self) -> "ConvertOptions":
        if self.top_k_tokens % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} does not divide top_k_tokens {self.top_k_tokens}"
            )
        check_switches(self.layout, self.sparse_kv, self.window_kv)
        if self.init == "aligned" and (self.sparse_kv, self.window_kv) != ("shared", "own"):
            raise ValueError(
                "init aligned fits layers to shared keys and values and keeps the SWA branch as it "
                f"is: with sparse_kv {self.sparse_kv} and window_kv {self.window_kv} use init copy"
            )
        places = ("ratio", "pattern", "full_layers", "fit")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both place the full layers: give one")
        placed = self.pattern is not None or self.full_layers is not None
        if self.strategy is not None and placed != (self.strategy == "manual"):
            raise ValueError(
                f"strategy {self.strategy} and {' and '.join(given) or 'no pattern'} do not go "
                "together: a pattern or full_layers is strategy manual, and only that"
            )
        if self.fit is None and (self.context is not None or self.batch is not None):
            raise ValueError("context and batch say what is to fit: give fit, such as 24GiB, too")
        if self.fit is not None and (self.layout == "full" or not self.last_layer_full):
            raise ValueError(
                "fit places sparse layers between a full first and a full last one: it goes "
                "neither with layout full nor with last_layer_full=false"
            )
        if self.measures:
            self._check_scored()
        elif self.scores is not None:
            raise ValueError(f"scores are of a strategy that measures: {', '.join(STRATEGIES)}")
        return self

    def _check_scored(self) -> None:
        if self.layout != "hysparse":
            raise ValueError(
                f"strategy {self.strategy} measures what layers share: layout {self.layout} "
                "shares nothing, use strategy uniform or manual"
            )
        if not self.last_layer_full:
            raise ValueError(
                f"strategy {self.strategy} keeps the last layer full: last_layer_full=false is for "
                "strategy uniform"
            )
