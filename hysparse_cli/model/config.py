"""The configuration of a HySparse model, on disk and in memory, without torch.

On disk ``model_type`` is "hysparse" and ``base_model_type`` the dense family's: under its own
family's name a checkpoint would silently load as the dense model. In memory it is a subclass of the
family's config class (see registration.py).
"""

import json
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.model.kinds import KINDS, NO_WINDOW_TOKENS, WITHOUT_WINDOW, Kind, LayoutName
from hysparse_cli.pattern import Pattern
from hysparse_cli.printable import printable, single_line

MODEL_TYPE = "hysparse"
FORMAT_VERSION = 1
SINK_OFF = -10.0  # a sink's start: next to nothing, yet finite, or its gradient would be dead

Size = Annotated[int, Field(ge=1, lt=2**31)]
SparseKv = Literal["shared", "own"]
WindowKv = Literal["own", "shared", "none"]

HUB_SHIM_NAME = "hysparse_hub.py"
HUB_SHIM = '''"""Lets transformers find HySparse where it is installed: pip install hysparse."""

from hysparse_cli.model.registration import HySparseConfig

__all__ = ["HySparseConfig"]
'''
SHIM_AUTO_MAP = {"AutoConfig": f"{HUB_SHIM_NAME.removesuffix('.py')}.HySparseConfig"}


@dataclass(frozen=True)
class HysparseSpec:
    """What makes a checkpoint HySparse: the ``hysparse`` section of its config.json.

    pattern: one letter a layer (pattern.py). layout: "hysparse"; "hybrid-swa" has no block-sparse
    branch; "full" is the dense model. sparse_kv, window_kv: whose keys and values the block-sparse
    branch and the SWA branch read, the server's ("shared") or the layer's own; window_kv "none"
    leaves the SWA branch out, and the gates with it. What is not the default is an ablation of the
    paper's Table 4. swapped: pairs of layers whose dense attention has traded places
    (convert/swaps.py); the weights have, so that nothing but a dense teacher's layers differs.

    Raises: ValueError where the switches do not fit the layout.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    pattern: str
    layout: LayoutName = "hysparse"
    block_size: Size = 64
    top_k_tokens: Size = 1024
    window_tokens: Annotated[int, Field(ge=NO_WINDOW_TOKENS, lt=2**31)] = 128
    sparse_kv: SparseKv = "shared"
    window_kv: WindowKv = "own"
    swapped: tuple[tuple[int, int], ...] = ()
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_switches(self.layout, self.sparse_kv, self.window_kv)

    @cached_property
    def layers(self) -> Pattern:
        return Pattern(self.pattern)

    @property
    def top_k_blocks(self) -> int:
        return self.top_k_tokens // self.block_size

    @property
    def kind(self) -> Kind:
        """The row of the sparse layers in KINDS."""
        alone = self.layout == "hysparse" and self.window_kv == "none"
        return KINDS[WITHOUT_WINDOW if alone else self.layout]

    @property
    def selects(self) -> bool:
        """Whether the sparse layers have a block-sparse branch, which the full ones select for."""
        return self.kind.selects

    @property
    def layer_types(self) -> list[str]:
        """transformers' name for what each layer's cache keeps: all tokens, or a window of them."""
        sparse = "full_attention" if self.kind.caches_all(self) else "sliding_attention"
        full = self.layers.full_layers
        return ["full_attention" if i in full else sparse for i in range(len(self.pattern))]

    @property
    def cache_window_tokens(self) -> int:
        """The ``sliding_window`` of the sparse layers' caches; next to none where none is read."""
        return self.kind.cache_window(self)

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        """Each layer's cache: its window in tokens, or None where it keeps all tokens."""
        window = self.cache_window_tokens
        return tuple(window if t == "sliding_attention" else None for t in self.layer_types)


def check_switches(layout: LayoutName, sparse_kv: SparseKv, window_kv: WindowKv) -> None:
    """Refuse switches of branches that ``layout`` does not have.

    Raises: ValueError.
    """
    if layout == "hybrid-swa" and (sparse_kv, window_kv) != ("shared", "own"):
        raise ValueError(
            f"layout hybrid-swa has the SWA branch alone, over each layer's own keys: sparse_kv "
            f"{sparse_kv} and window_kv {window_kv} are for layout hysparse, leave them out"
        )


@dataclass(frozen=True)
class NewTensor:
    """A tensor that a sparse layer adds, and the value it starts from."""

    shape: tuple[int, ...]
    fill: float


def new_tensors(
    num_heads: int, hidden_size: int, spec: HysparseSpec, *, own_sinks: bool = False
) -> dict[str, NewTensor]:
    """The tensors that a sparse layer adds, by name below its attention module.

    Gate rows are head-major: 2h is head h's block-sparse gate, 2h + 1 its SWA gate (eq. 8).

    Args:
        own_sinks: the family has sinks of its own (gpt_oss), which ours are added to.
    """
    tensors = {}
    if spec.kind.gate is not None:
        rows = spec.kind.gate.logits_per_head * num_heads
        tensors["hysparse.gate.weight"] = NewTensor((rows, hidden_size), 0.0)
        tensors["hysparse.gate.bias"] = NewTensor((rows,), 0.0)
    sinks = NewTensor((num_heads, len(spec.kind.branches)), 0.0 if own_sinks else SINK_OFF)
    return tensors | {"hysparse.sinks": sinks}


def converted_config(base: dict[str, Any], spec: HysparseSpec) -> dict[str, Any]:
    """The config.json of the checkpoint that ``base``'s model becomes."""
    config = {**base, "model_type": MODEL_TYPE, "base_model_type": base["model_type"]}
    config["architectures"] = [f"HySparse{name}" for name in base.get("architectures") or []]
    config["auto_map"] = SHIM_AUTO_MAP
    config["hysparse"] = asdict(spec)
    if spec.layers.sparse_layers:
        config["layer_types"] = spec.layer_types
        config["sliding_window"] = spec.cache_window_tokens
        if "attention_dropout" in config:  # HySparse attention has none
            config["attention_dropout"] = 0.0
    return config


def spec_of(config: Any) -> HysparseSpec | None:
    """The spec of a transformers config or of a config.json's contents; None for a dense model.

    Raises: ValueError where a newer hysparse wrote it; UnreadableInput where none did.
    """
    section = config.get("hysparse") if isinstance(config, dict) else vars(config).get("hysparse")
    if section is None:
        return None
    version = section.get("version") if isinstance(section, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise ValueError(
            f"hysparse.version in config.json is {printable(repr(version))}, but this hysparse "
            f"reads version {FORMAT_VERSION}: install a newer hysparse"
        )
    try:
        # as JSON, whose lists are Python's tuples
        spec = _adapter().validate_json(json.dumps(section), strict=True)
        Pattern(spec.pattern)
        return spec
    except InvalidRecipe as error:
        raise UnreadableInput(f"hysparse.pattern in config.json: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("hysparse", *first["loc"])))
        raise UnreadableInput(
            f"{printable(field)} in config.json: {single_line(first['msg'])} (it has "
            f"{printable(repr(first['input']))}): convert the dense checkpoint again"
        ) from None


@cache
def _adapter() -> TypeAdapter[HysparseSpec]:
    return TypeAdapter(HysparseSpec)
