"""Options of ``hysparse convert``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hysparse_cli.model.config import SparseKv, WindowKv, check_switches
from hysparse_cli.model.kinds import LayoutName
from hysparse_cli.recipe.fields import Device, Dtype, FilePath, Positive, Real, Section, Seed, Size

Strategy = Literal["uniform", "manual", "dp", "greedy", "kl"]
Init = Literal["constant", "copy", "aligned"]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
SCORED = ("dp", "greedy", "kl")


class ConvertOptions(Section):
    """``hysparse convert``: where the full layers go, the sizes, and what is written how.

    ``pattern`` or ``full_layers`` (strategy "manual") say where the full layers are; ``ratio`` or
    ``fit`` say how many, and ``strategy`` chooses them: "uniform" as the paper does, the others
    measure the model on calibration text first (see selection/). Where nothing is given, the ratio
    is 1:3 and the strategy uniform.

    ``fit`` is memory for the weights and the KV cache of ``batch`` sequences of ``context`` tokens
    (as many as the model reads by default). ``calibration`` is a file of text, made up by default;
    ``scores`` the file that keeps what was measured, ``OUT.scores.json`` by default.
    ``rope_theta`` is a new base of the rotary embedding and
    ``max_position_embeddings`` a new longest input, for a model that will be healed at that length.

    ``sparse_kv`` and ``window_kv`` are the ablations of the paper's Table 4 (model/config.py).
    ``swap_attention`` names pairs of layers whose dense attention trades places (convert/swaps.py),
    or "auto": into the full layers, the attention nearby that needs far context most.
    ``init`` says how the new layers start (see init/), and ``explain`` measures what each mechanism
    costs (convert/ledger.py), both on the calibration text, of which ``explain`` reads the first
    ``explain_tokens``: it runs the model many times.
    """

    layout: LayoutName = "hysparse"
    strategy: Strategy | None = None
    ratio: str | None = None
    fit: Size | None = None
    context: Positive | None = None
    batch: Positive | None = None
    pattern: str | None = None
    full_layers: list[int] | None = None
    last_layer_full: bool = True
    block_size: Positive = 64
    top_k_tokens: Positive = 1024
    window_tokens: Annotated[int, Field(gt=1, lt=2**31)] = 128
    rope_theta: Annotated[Real, Field(gt=0, le=1e15)] | None = None
    max_position_embeddings: Positive | None = None
    sparse_kv: SparseKv = "shared"
    window_kv: WindowKv = "own"
    swap_attention: Literal["auto"] | list[Pair] | None = None
    init: Init = "constant"
    explain: bool = False
    explain_tokens: Positive = 8192
    dtype: Dtype = "auto"
    max_shard_size: Size = "5GB"
    calibration: FilePath | None = None
    calibration_text_field: str = "text"
    calibration_tokens: Positive = 16384
    calibration_sequence_tokens: Annotated[int, Field(gt=1, lt=2**31)] | None = None
    seed: Seed = 0
    scores: FilePath | None = None
    device: Device = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    @property
    def measures(self) -> bool:
        """Whether the strategy measures the model."""
        return self.strategy in SCORED

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
            raise ValueError(f"scores are of a strategy that measures: {', '.join(SCORED)}")
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
