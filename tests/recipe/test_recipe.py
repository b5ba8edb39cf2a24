"""Recipes: where options come from, and that every error is reported at once with its path."""

from pathlib import Path

import pytest

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.recipe import (
    BenchOptions,
    ConvertOptions,
    EvalOptions,
    FinetuneOptions,
    InspectOptions,
    Recipe,
    Section,
    bytes_of,
    load_section,
    name_of,
    to_yaml,
)
from hysparse_cli.recipe.finetune import StageOptions


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("convert:\n  ratio: '1:1'\n  block_size: 32\n  window_tokens: 64\n")
    return path


def test_later_sources_win(recipe: Path) -> None:
    options = load_section(
        ConvertOptions,
        recipe,
        ("convert.block_size=16", "convert.top_k_tokens=512"),
        {"top_k_tokens": 256, "dtype": None},
    )
    assert (options.ratio, options.window_tokens) == ("1:1", 64)
    assert (options.block_size, options.top_k_tokens, options.dtype) == (16, 256, "auto")


def test_an_empty_recipe_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_section(ConvertOptions, path) == ConvertOptions()


def test_yaml_numbers_with_an_exponent_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("finetune:\n  learning_rate: 1e-3\n")
    assert load_section(FinetuneOptions, path).learning_rate == 1e-3


@pytest.mark.parametrize("kind", [field.annotation for field in Recipe.model_fields.values()])
def test_a_resolved_section_reads_back_unchanged(kind: type, tmp_path: Path) -> None:
    assert issubclass(kind, Section)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(kind()))
    assert load_section(kind, path) == kind()


def test_all_errors_are_reported_at_once_each_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "convert:\n  blocksize: 64\n  window_tokens: wide\n  max_shard_size: big\n"
        "finetune:\n  steps: 1.5\nfoo: {}\n"
    )
    with pytest.raises(InvalidRecipe) as error:
        load_section(ConvertOptions, path)
    message = str(error.value)
    wrong = ("convert.blocksize", "convert.window_tokens", "convert.max_shard_size")
    for where in (str(path), *wrong, "finetune.steps", "foo", "(got 'wide')"):
        assert where in message
    assert "\n" not in message and "block_size" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("convert: [", "not valid YAML"),
        ("- convert", "must be a mapping"),
        ("convert: 3", "convert"),
        ("convert: {block_size: 48}", "block_size 48 does not divide top_k_tokens 1024"),
        ("convert: {pattern: FSF, ratio: '1:3'}", "ratio and pattern both place the full layers"),
        ("convert: {block_size: true}", "convert.block_size"),
    ],
)
def test_wrong_recipes_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRecipe, match=reason) as error:
        load_section(ConvertOptions, path)
    assert "\n" not in str(error.value)


def test_errors_in_a_stage_name_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "finetune:\n  stages:\n"
        "    - {objective: align, steps: 5}\n"
        "    - {objective: heal, steps: 0, speed: 3, stepps: 2}\n"
        "    - {objective: train, steps: 5, distill_weight: 1.0}\n"
    )
    with pytest.raises(InvalidRecipe) as error:
        load_section(FinetuneOptions, path)
    for part in (
        "stages.1.objective",
        "stages.1.steps",
        "stages.1.speed: unknown field; known: objective, steps,",
        "stages.1.stepps: unknown field; did you mean steps?",
        "stages.2: objective train takes no distill_weight",
    ):
        assert part in str(error.value)


def test_stages_that_do_not_fit_are_all_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "finetune:\n  lora_alpha: 4\n  stages:\n"
        "    - {objective: align, steps: 5, trainable: all}\n"
        "    - {objective: train, steps: 5, warmup_steps: 4, decay_fraction: 0.5}\n"
        "    - {objective: distill, steps: 5, distill_weight: 0.0}\n"
    )
    with pytest.raises(InvalidRecipe) as error:
        load_section(FinetuneOptions, path)
    for part in (
        "lora_alpha needs lora_rank",
        "stages.0: trainable all would change full layers",
        "stages.1: warmup_steps 4 and decay_fraction 0.5 (2 steps) are together more than steps 5",
        "stages.2: distill_weight and hidden_weight are both 0",
    ):
        assert part in str(error.value)


def test_a_stage_takes_what_it_does_not_say_from_the_section() -> None:
    options = FinetuneOptions(
        learning_rate=1e-3,
        decay_fraction=0.5,
        hidden_weight=2.0,
        stages=[
            StageOptions(objective="align", steps=40, learning_rate=1e-2),
            StageOptions(objective="distill", steps=60, trainable="new", distill_weight=0.3),
            StageOptions(objective="train", steps=20, warmup_steps=0),
        ],
    )
    align, distill, train = options.resolved_stages()
    assert (align.learning_rate, align.trainable, align.warmup_steps) == (
        1e-2,
        "sparse-attention",
        4,
    )
    assert (distill.learning_rate, distill.trainable, distill.warmup_steps) == (1e-3, "new", 6)
    assert (distill.distill_weight, distill.hidden_weight, distill.decay_steps) == (0.3, 2.0, 30)
    assert (train.trainable, train.warmup_steps, train.hidden_weight) == ("all", 0, 0.0)
    assert [stage.needs_teacher for stage in (align, distill, train)] == [True, True, False]
    assert options.total_steps == 120


def test_without_stages_there_is_one() -> None:
    (train,) = FinetuneOptions().resolved_stages()
    assert (train.objective, train.steps, train.warmup_steps) == ("train", 200, 20)
    (distill,) = FinetuneOptions(teacher="dense", steps=50, trainable="new").resolved_stages()
    assert (distill.objective, distill.steps, distill.trainable) == ("distill", 50, "new")
    assert distill.distill_weight == 1.0
    (train,) = FinetuneOptions(teacher="dense", distill_weight=0.0).resolved_stages()
    assert train.objective == "train"


@pytest.mark.parametrize("steps", [3, 7, 10, 100, 1000])
def test_steps_make_the_stages_as_long_in_all_in_proportion(steps: int, tmp_path: Path) -> None:
    stages = [StageOptions(objective="train", steps=count) for count in (2, 3, 5)]
    lengths = [s.steps for s in FinetuneOptions(stages=stages, steps=steps).resolved_stages()]
    assert sum(lengths) == steps
    shares = zip(lengths, (0.2, 0.3, 0.5), strict=True)
    assert all(abs(length - share * steps) <= 1 for length, share in shares)


def test_steps_too_few_for_the_stages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(
        "finetune: {stages: [{objective: train, steps: 9}, {objective: train, steps: 1}]}"
    )
    with pytest.raises(InvalidRecipe, match="steps 3 are too few for 2 stages"):
        load_section(FinetuneOptions, path, flags={"steps": 3})


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match="No such file"):
        load_section(ConvertOptions, tmp_path / "absent.yaml")


@pytest.mark.parametrize("assignment", ["block_size=3", "convert.block_size", "convert.=1"])
def test_assignments_need_a_section_a_field_and_a_value(assignment: str) -> None:
    with pytest.raises(InvalidRecipe, match=r"section\.field=value"):
        load_section(ConvertOptions, None, (assignment,))


def test_sizes() -> None:
    assert [bytes_of(text) for text in ("5GB", "2 GiB", "300kb", "17")] == [
        5 * 10**9,
        2 * 2**30,
        300_000,
        17,
    ]


# section, field, texts that are read, the value, a text that is not, and what is said of that
WRITTEN = [
    (ConvertOptions, "full_layers", ("0,4,8", "0, 4,8", "[0, 4, 8]"), [0, 4, 8], "0,x", "number"),
    (ConvertOptions, "block_size", ("32", "'32'"), 32, "8k", "not a whole number such as 64"),
    (
        ConvertOptions,
        "calibration_tokens",
        ("8k", "8192", "8K"),
        8192,
        "8m",
        "not one length such as 512 or 8k",
    ),
    (ConvertOptions, "ratio", ("1:3", "'1:3'"), "1:3", "[1]", "valid string"),
    (ConvertOptions, "fit", ("24GiB", "'24GiB'"), "24GiB", "24 apples", "such as 5GB, 500MB"),
    (ConvertOptions, "max_shard_size", ("5000000",), "5000000", "0", "not a size"),
    (
        ConvertOptions,
        "swap_attention",
        ("8:9,10:11", "[8:9, 10:11]", "[[8, 9], [10, 11]]"),
        [[8, 9], [10, 11]],
        "8:x",
        "neither auto nor pairs of layers such as 8:9,10:11",
    ),
    (BenchOptions, "context", ("512, 8k,1K", "[512, 8k, 1024]"), [512, 8192, 1024], "1.5k", "8k"),
    (BenchOptions, "context", ("4k", "[4k]", "4096"), [4096], "1", "greater than 1"),
    (BenchOptions, "phases", ("memory, decode", "[memory, decode]"), ["memory", "decode"], "x", ""),
    (BenchOptions, "against", ("a,b", "['a,b']"), ["a,b"], "''", "it is empty"),
    (FinetuneOptions, "learning_rate", ("3e-4", "0.0003"), 3e-4, "fast", "such as 0.1 or 3e-4"),
    (FinetuneOptions, "save_every_steps", ("off", "false"), "off", "never", "nor off"),
    (EvalOptions, "require", ("loss<=3,5", "['loss<=3,5']"), ["loss<=3,5"], "[3]", "string"),
]


@pytest.mark.parametrize(("kind", "field", "texts", "value", "wrong", "said"), WRITTEN)
def test_a_value_is_written_alike_in_yaml_set_and_flags(
    kind: type[Section],
    field: str,
    texts: tuple[str, ...],
    value: object,
    wrong: str,
    said: str,
    tmp_path: Path,
) -> None:
    name, path = name_of(kind), tmp_path / "recipe.yaml"
    for text in texts:
        path.write_text(f"{name}:\n  {field}: {text}\n")
        in_yaml = load_section(kind, path)
        by_set = load_section(kind, None, (f"{name}.{field}={text}",))
        assert getattr(in_yaml, field) == getattr(by_set, field) == value
    assert getattr(load_section(kind, flags={field: texts[0]}), field) == value
    with pytest.raises(InvalidRecipe, match=f"{name}.{field}.*{said}"):
        load_section(kind, None, (f"{name}.{field}={wrong}",))


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        (ConvertOptions, ["calibration", "scores"]),
        (FinetuneOptions, ["data", "resume"]),
        (EvalOptions, ["data", "lm_eval_folder", "output"]),
        (InspectOptions, ["data", "html", "png", "npz", "lists"]),
        (BenchOptions, ["lists"]),
    ],
)
def test_files_of_a_recipe_may_be_in_the_users_home(
    section: type[Section], fields: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = next(n for n, field in Recipe.model_fields.items() if field.annotation is section)
    strategy = ["convert.strategy=dp"]  # one that has scores
    options = load_section(section, None, strategy + [f"{name}.{f}=~/file" for f in fields])
    assert {getattr(options, field) for field in fields} == {str(tmp_path / "file")}
