"""Chooses what is compared: a model, and its peers of the same shape, dense and hybrid SWA."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hysparse_cli import pattern as patterns
from hysparse_cli.bench.presets import PRESETS
from hysparse_cli.errors import InvalidRecipe, UnsupportedModel
from hysparse_cli.families import family_of
from hysparse_cli.files.checkpoint import read_config
from hysparse_cli.files.config_json import check_config
from hysparse_cli.files.source import locate
from hysparse_cli.model.config import HysparseSpec, converted_config, spec_of
from hysparse_cli.model.loading import short_names
from hysparse_cli.recipe import BenchOptions
from hysparse_cli.recipe.bench import DENSE, SubjectName

DEFAULT_RATIO = "1:3"
OURS = ("auto_map", "base_model_type", "hysparse", "layer_types", "sliding_window")


@dataclass(frozen=True)
class Subject:
    """One model to measure.

    config: as in config.json. checkpoint: the folder of its weights, or None where they are drawn
    at random. backend: who computes dense attention, "sdpa" being torch's own choice.
    """

    name: str
    config: dict[str, Any]
    checkpoint: str | None = None
    backend: Literal["sdpa", "cudnn", "flash"] = "sdpa"

    @property
    def spec(self) -> HysparseSpec | None:
        """None where every layer is dense."""
        spec = spec_of(self.config)
        return spec if spec is not None and spec.layers.sparse_layers else None

    @property
    def is_dense(self) -> bool:
        return self.spec is None


@dataclass(frozen=True)
class _Model:
    """What all peers are made from: a dense config, where its layers are full, and weights."""

    dense: dict[str, Any]
    spec: HysparseSpec
    own: Subject | None  # the checkpoint itself


def subjects_of(model: str | None, options: BenchOptions, *, on_cuda: bool) -> list[Subject]:
    """The subjects that ``options`` name, of a checkpoint or of ``options.config``.

    The checkpoint's own weights are used where a subject is what the checkpoint is, converted or
    dense; peers have random weights of the same shapes.

    Raises: InvalidRecipe where there is neither or both, or a context is longer than a checkpoint
        reads; UnreadableInput or UnsupportedModel where a config can't be used.
    """
    source = _model(model, options)
    wanted = options.subjects or _default(on_cuda)
    found = [_subject(name, source, options) for name in dict.fromkeys(wanted)]
    others = list(dict.fromkeys(options.against))
    names = short_names(others)
    if {*names} & {subject.name for subject in found}:
        names = others
    for name, checkpoint in zip(names, others, strict=True):
        folder = locate(checkpoint, trust_remote_code=options.trust_remote_code).folder
        found.append(Subject(name, read_config(folder), str(folder)))
    return [_with_room(subject, options) for subject in found]


def _default(on_cuda: bool) -> list[SubjectName]:
    dense: list[SubjectName] = ["dense-cudnn", "dense-flash"] if on_cuda else ["dense"]
    return [*dense, "hybrid-swa", "hysparse"]


def _model(model: str | None, options: BenchOptions) -> _Model:
    if (model is None) == (options.config is None):
        raise InvalidRecipe(
            "bench measures either a checkpoint or --config, a config alone with random weights: "
            "give one of the two"
        )
    if options.config is not None:
        dense = _config(options.config, options.trust_remote_code)
        return _Model(dense, _spec(dense, options), None)
    folder = locate(str(model), trust_remote_code=options.trust_remote_code).folder
    config = read_config(folder)
    own = Subject(Path(str(model)).name, config, str(folder))
    if own.is_dense:
        return _Model(dense_of(config), _spec(dense_of(config), options), own)
    if options.ratio is not None or options.pattern is not None:
        raise InvalidRecipe(
            f"{model} has a pattern of its own, {own.spec and own.spec.pattern}: leave ratio and "
            "pattern out, or give its dense model"
        )
    assert own.spec is not None
    return _Model(dense_of(config), own.spec, own)


def _config(name: str, trust_remote_code: bool) -> dict[str, Any]:
    if name in PRESETS:
        return dict(PRESETS[name])
    source = locate(name, weights=False, trust_remote_code=trust_remote_code)
    config = read_config(source.folder)
    check_config(config, str(source.folder / "config.json"))
    return dense_of(config)


def dense_of(config: dict[str, Any]) -> dict[str, Any]:
    """The dense model's config.json: what a converted one adds is left out."""
    if "base_model_type" not in config:
        return config
    kept = {key: value for key, value in config.items() if key not in OURS}
    return {**kept, "model_type": config["base_model_type"]}


def _spec(dense: dict[str, Any], options: BenchOptions) -> HysparseSpec:
    model_type, num_layers = dense.get("model_type"), dense.get("num_hidden_layers")
    if not isinstance(model_type, str) or not isinstance(num_layers, int):
        raise UnsupportedModel("config.json has no model_type or no num_hidden_layers")
    family_of(model_type)
    if options.pattern is not None:
        pattern = patterns.from_pattern(options.pattern, num_layers)
    else:
        pattern = patterns.from_ratio(
            options.ratio or DEFAULT_RATIO, num_layers, last_layer_full=options.last_layer_full
        )
    return HysparseSpec(
        pattern=pattern.pattern,
        block_size=options.block_size,
        top_k_tokens=options.top_k_tokens,
        window_tokens=options.window_tokens,
    )


def _subject(name: SubjectName, source: _Model, options: BenchOptions) -> Subject:
    own = None if options.random_weights else source.own
    if name in DENSE:
        checkpoint = own.checkpoint if own is not None and own.is_dense else None
        config = own.config if own is not None and checkpoint else source.dense
        return Subject(name, config, checkpoint, DENSE[name])
    layout: Literal["hysparse", "hybrid-swa"] = "hysparse"
    if name == "hybrid-swa":
        layout = "hybrid-swa"
    if own is not None and own.spec is not None and own.spec.layout == layout:
        return Subject(name, own.config, own.checkpoint)
    sizes = asdict(source.spec)
    if source.spec.layout != layout or layout == "hybrid-swa":
        sizes |= {"layout": layout, "sparse_kv": "shared", "window_kv": "own"}
    sizes["swapped"] = ()
    spec = HysparseSpec(**sizes)
    return Subject(name, converted_config(source.dense, spec))


def _with_room(subject: Subject, options: BenchOptions) -> Subject:
    """``subject``, able to read the longest context: random weights have no limit."""
    asked = max(options.context)
    longest = subject.config.get("max_position_embeddings")
    if longest is None or longest >= asked:
        return subject
    if subject.checkpoint is None:
        config = subject.config | {"max_position_embeddings": asked}
        return Subject(subject.name, config, None, subject.backend)
    raise InvalidRecipe(
        f"bench.context {asked} is longer than {subject.checkpoint} reads: at most {longest} "
        "tokens, or any number with --random-weights"
    )
