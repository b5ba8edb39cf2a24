"""Every command's options, typed: a YAML recipe, flags and ``--set a.b=c`` in, one section out.

A recipe has a section for each command, and its keys are the flags with underscores. A recipe holds
all options of a command; the common ones have a flag. Later sources win: recipe, ``--set``, flags.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hysparse_cli.errors import InvalidRecipe, UnreadableInput

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Positive = Annotated[int, Field(gt=0)]
# YAML reads 1e-3 as a string, so numbers with a point are not held to strict types.
Real = Annotated[float, Field(strict=False)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: str) -> int:
    """The bytes of a size such as ``5GB``, ``300 MiB`` or ``1000000``.

    Raises: ValueError where it is not a number and a unit.
    """
    found = re.fullmatch(r"([0-9]+) ?([A-Za-z]*)", size.strip())
    if not found or found[2].upper() not in _UNITS or not int(found[1]):
        raise ValueError("not a size such as 5GB, 500MB or 2GiB")
    return int(found[1]) * _UNITS[found[2].upper()]


def _checked_size(size: str) -> str:
    bytes_of(size)
    return size


Size = Annotated[str, AfterValidator(_checked_size)]


class Section(BaseModel):
    """A command's options: unknown fields and loose types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ConvertOptions(Section):
    """``hysparse convert``: one of ``ratio``, ``pattern``, ``full_layers`` places the full layers.

    Where none is given, the ratio is 1:3.
    """

    layout: Literal["hysparse", "hybrid-swa", "full"] = "hysparse"
    ratio: str | None = None
    pattern: str | None = None
    full_layers: list[int] | None = None
    last_layer_full: bool = True
    block_size: Positive = 64
    top_k_tokens: Positive = 1024
    window_tokens: Annotated[int, Field(gt=1)] = 128
    dtype: Dtype = "auto"
    max_shard_size: Size = "5GB"
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "ConvertOptions":
        if self.top_k_tokens % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} does not divide top_k_tokens {self.top_k_tokens}"
            )
        places = ("ratio", "pattern", "full_layers")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both place the full layers: give one")
        return self


class FinetuneOptions(Section):
    """``hysparse finetune``: next-token loss, or with ``teacher`` distillation mixed in.

    A step reads ``batch_size`` rows ``gradient_accumulation`` times. The learning rate warms up for
    ``warmup_steps`` (a tenth of the steps by default), stays, and decays over the last
    ``decay_fraction`` of the steps. ``distill_weight`` 1 is distillation alone.
    """

    data: str | None = None
    text_field: str = "text"
    steps: Positive = 200
    batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    sequence_tokens: Annotated[int, Field(gt=1)] = 1024
    shuffle_rows: Positive = 256
    learning_rate: Annotated[Real, Field(gt=0)] = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_fraction: Fraction = 0.2
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.95
    adam_epsilon: Annotated[Real, Field(gt=0)] = 1e-10
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    teacher: str | None = None
    distill_weight: Fraction = 1.0
    trainable: Literal["all", "attention", "new"] = "all"
    gradient_checkpointing: bool = False
    save_every_steps: Positive | None = None
    resume: bool = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0
    overwrite: bool = False

    @property
    def warmup(self) -> int:
        """Steps of warmup."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def decay(self) -> int:
        """Steps of decay."""
        return round(self.steps * self.decay_fraction)

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneOptions":
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup} and decay_fraction {self.decay_fraction} "
                f"({self.decay} steps) are together more than steps {self.steps}"
            )
        return self


class EvalOptions(Section):
    """``hysparse eval``: loss on ``data``, retrieval accuracy at ``retrieval_tokens``.

    Retrieval plants its facts in text of ``data``, or of its own making where there is none.
    """

    data: str | None = None
    text_field: str = "text"
    sequence_tokens: Positive = 2048
    max_tokens: Positive | None = None
    batch_size: Positive = 1
    retrieval_tokens: list[Positive] = []
    retrieval_forms: Annotated[
        list[Literal["magic-number", "secret", "key-value", "recall"]], Field(min_length=1)
    ] = ["magic-number", "secret", "key-value", "recall"]
    retrieval_samples: Positive = 10
    retrieval_facts: Positive = 8
    retrieval_questions: Positive = 4
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _answerable(self) -> "EvalOptions":
        if self.retrieval_questions > self.retrieval_facts:
            raise ValueError(
                f"retrieval_questions {self.retrieval_questions} is more than retrieval_facts "
                f"{self.retrieval_facts}: each question asks for another fact"
            )
        return self


class BenchOptions(Section):
    """``hysparse bench``: KV bytes, prefill and decode, against ``against``."""

    against: list[str] = []
    context: list[Positive] = [512, 2048]
    batch: list[Positive] = [1]
    decode_tokens: Positive = 16
    repeat: Positive = 3
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0


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
    lists: str | None = None
    measure_ms: Positive = 100
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Device = "auto"
    seed: int = 0

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


class InspectOptions(Section):
    """``hysparse inspect-topk``: one of ``prompt`` or ``data`` is what the model reads.

    ``lists`` is a file to write: the selected blocks of every token, for ``bench kernels``.
    """

    prompt: str | None = None
    data: str | None = None
    text_field: str = "text"
    max_tokens: Positive = 2048
    lists: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0


class GenerateOptions(Section):
    """``hysparse generate``."""

    prompt: str | None = None
    max_new_tokens: Positive = 128
    temperature: Annotated[Real, Field(ge=0)] = 0.0
    top_p: Fraction = 1.0
    num_beams: Positive = 1
    chat: bool = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0


class Recipe(Section):
    """A whole recipe file; a section that is absent has its defaults."""

    convert: ConvertOptions = ConvertOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    eval: EvalOptions = EvalOptions()
    bench: BenchOptions = BenchOptions()
    bench_kernels: KernelBenchOptions = KernelBenchOptions()
    inspect_topk: InspectOptions = InspectOptions()
    generate: GenerateOptions = GenerateOptions()


S = TypeVar("S", bound=Section)


def load_section(
    kind: type[S],
    recipe_path: Path | None = None,
    assignments: Sequence[str] | None = None,
    flags: dict[str, Any] | None = None,
) -> S:
    """The options of one command from a recipe, ``section.field=value`` assignments and flags.

    Args:
        kind: the section's class, such as ``ConvertOptions``.
        recipe_path: a YAML file, or None.
        assignments: what ``--set`` was given; values are read as YAML.
        flags: field -> value; None means the flag was not given. Other names are left alone, so
            that a command can hand over its ``locals()``.
    Raises: InvalidRecipe naming every wrong field at once; UnreadableInput where the file
        can't be read.
    """
    name = next(n for n, field in Recipe.model_fields.items() if field.annotation is kind)
    source = str(recipe_path) if recipe_path else "options"
    data = _read_yaml(recipe_path) if recipe_path else {}
    for assignment in assignments or ():
        _assign(data, assignment)
    given = {
        key: value
        for key, value in (flags or {}).items()
        if key in kind.model_fields and value is not None
    }
    section = data.setdefault(name, {})
    if isinstance(section, dict):
        section.update(given)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InvalidRecipe(f"{source}: {_all_errors(error)}") from None
    resolved: S = getattr(recipe, name)
    return resolved


def integer_list(field: str, text: str | None) -> list[int] | None:
    """The numbers of a flag such as ``0,4,8,11``; None stays None.

    Raises: InvalidRecipe, naming ``field``, where it is no list of whole numbers.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRecipe(
            f"{field} {text!r} is not a list of whole numbers such as 0,4,8,11"
        ) from None


def token_counts(field: str, text: str | None) -> list[int] | None:
    """As ``integer_list``, for lengths such as ``512,8k``: a k is 1024."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    plain = ",".join(re.sub(r"^([0-9]+)[kK]$", lambda n: str(1024 * int(n[1])), p) for p in parts)
    return integer_list(field, plain)


def to_yaml(section: Section) -> str:
    """The resolved section as a recipe that ``load_section`` reads back unchanged."""
    name = next(n for n, field in Recipe.model_fields.items() if field.annotation is type(section))
    return yaml.safe_dump({name: section.model_dump(mode="json")}, sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableInput(
            f"recipe {path}: {error.strerror}; give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise InvalidRecipe(f"recipe {path} is not valid YAML: {where}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InvalidRecipe(
            f"recipe {path} holds a {type(data).__name__}: it must be a mapping of sections, "
            f"such as {', '.join(Recipe.model_fields)}"
        )
    return data


def _assign(data: dict[str, Any], assignment: str) -> None:
    path, separator, value = assignment.partition("=")
    section, dot, field = path.partition(".")
    if not (separator and dot and field):
        raise InvalidRecipe(
            f"--set {assignment!r} is not section.field=value, such as convert.block_size=32"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InvalidRecipe(f"--set {assignment!r}: the value is not valid YAML") from None
    target = data.setdefault(section, {})
    if isinstance(target, dict):
        target[field] = parsed


def _all_errors(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"])) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown field; known: {', '.join(_known_fields(item['loc'][:-1]))}"
        elif isinstance(item["input"], (str, int, float, bool, list)):
            message = f"{message} (got {item['input']!r})"
        parts.append(f"{where}: {message}")
    return "; ".join(parts)


def _known_fields(loc: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
