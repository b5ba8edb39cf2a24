"""Where outputs may go: nothing foreign is replaced, and what can't be written is said at once."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hysparse_cli.errors import InvalidRecipe, OutOfResources
from hysparse_cli.files.leftovers import recover
from hysparse_cli.files.output import (
    prepare_output,
    prepare_results,
    staged,
    whole_file,
    write_whole,
)
from hysparse_cli.files.replaceable import check_output, foreign_in
from hysparse_cli.inspect_topk.files import check_files
from hysparse_cli.recipe import (
    ConvertOptions,
    FinetuneOptions,
    InspectOptions,
    load_section,
    to_yaml,
)
from tests.conftest import Hysparse

CONFIG = '{"model_type": "llama"}'
OF_THE_HUB = (
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    *("merges.txt", "vocab.json", "tokenizer.model", "LICENSE.txt", "README.md", "NOTICE"),
    *("generation_config.json", ".gitattributes", "chat_template.jinja", "modeling_own.py"),
    *("additional_chat_templates/tool_use.jinja", ".cache/huggingface/download/x.metadata"),
)
FOREIGN = (
    *("src/main.py", ".git/HEAD", "notes.md", "train.py", "data.json", "requirements.txt"),
    *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"),
    *("pytorch_model.bin", "embeddings.safetensors", ".cache/mine/x", "empty/x", ".env"),
    *("additional_chat_templates/notes.md", "checkpoint-500/model.safetensors"),
)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CONFIG if name == "config.json" else "precious")
    return folder


def test_a_download_of_the_hub_is_replaced(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", "config.json", *OF_THE_HUB)
    with staged(out, overwrite=True) as partial:
        fill(partial, "config.json")
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_belongs_to_no_checkpoint_is_named_and_kept(tmp_path: Path, name: str) -> None:
    out = fill(tmp_path / "out", "config.json", *OF_THE_HUB, name)
    with pytest.raises(InvalidRecipe, match=name.split("/")[0]):
        check_output(out, overwrite=True)
    assert (out / name).read_text() == "precious"


def test_of_many_foreign_files_a_few_are_named(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    out = fill(tmp_path / "out", "config.json", *FOREIGN)
    run = hysparse("convert", tiny_original, out, "--overwrite")
    assert run.exit_code == 3 and run.stderr.count("\n") == 1
    assert "checkpoint, .cache/mine, .env, .git and 14 more, so" in run.stderr
    assert all((out / name).exists() for name in FOREIGN)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model_type": 3}', None])
def test_a_config_of_something_else_makes_no_checkpoint(
    tmp_path: Path, content: str | None
) -> None:
    out = fill(tmp_path / "out", "README.md")
    if content is not None:
        (out / "config.json").write_text(content)
    with pytest.raises(InvalidRecipe, match="no checkpoint"):
        check_output(out, overwrite=True)


def test_all_that_convert_and_finetune_write_can_be_replaced(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fill(tiny_checkpoint, "odd.json", "words.txt", "own.py", "additional_chat_templates/x.txt")
    out, healed, text = tmp_path / "out", tmp_path / "healed", tmp_path / "text.txt"
    assert hysparse("convert", tiny_checkpoint, out, "--trust-remote-code").exit_code == 0
    assert (out / "odd.json").exists() and not foreign_in(out)
    text.write_text(" ".join(f"w{i % 61}" for i in range(400)))
    how = ("--data", text, "--steps", 1, "--sequence-tokens", 32, "--batch-size", 1)
    run = hysparse("finetune", out, healed, *how, "--device", "cpu", "--overwrite")
    assert run.exit_code == 0, run.stderr
    assert (healed / "odd.json").exists() and not foreign_in(healed)
    assert "overwrite" not in (healed / "hysparse_recipe.yaml").read_text()
    (out / "odd.json").write_text("changed since")
    run = hysparse("convert", tiny_checkpoint, out, "--overwrite")
    assert run.exit_code == 3 and "odd.json" in run.stderr


@pytest.mark.parametrize(
    "where", [".", "..", "../..", "/", "~", "~/..", "link", "dangling", "mount"]
)
def test_places_that_are_never_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    working = fill(tmp_path / "home" / "a" / "b", "config.json")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(working)
    (working / "link").symlink_to(tmp_path)
    (working / "dangling").symlink_to(tmp_path / "nowhere")
    out = Path("/proc") if where == "mount" else Path(os.path.expanduser(where))
    for overwrite in (False, True):
        with pytest.raises(InvalidRecipe, match="OUT"):
            prepare_output(out, overwrite=overwrite)
    assert (working / "config.json").exists()


@pytest.mark.parametrize("out", ["n" * 255, "n" * 5000, "file/out", "/proc/none/out"])
def test_what_can_not_be_written_is_said_before_the_work(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("")
    run = hysparse("convert", tiny_original, tmp_path / out)
    assert run.exit_code == 5 and run.stderr.count("\n") == 1 and run.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "read only"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_file_system(read_only: Path) -> None:
    with pytest.raises(OutOfResources, match="Read-only file system"):
        prepare_output(read_only / "deep" / "out", overwrite=False)
    with pytest.raises(OutOfResources, match="Read-only file system"):
        prepare_results(read_only, "eval.json", "hysparse.eval/")


def test_a_parent_that_vanishes_midway(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with (
        pytest.raises(OutOfResources, match="can't write"),
        staged(out, overwrite=False) as partial,
    ):
        partial.rename(tmp_path / "moved")
        (tmp_path / "new").rmdir()
        (partial / "config.json").write_text(CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_an_input_that_vanishes_midway_is_no_fault_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out", overwrite=False):
        (tmp_path / "out-of-reach").read_text()
    assert not any(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutOfResources, match="disk full"):
            write_whole(tmp_path / "file", "x" * 2000)
        with (
            pytest.raises(OutOfResources, match="disk full"),
            staged(tmp_path / "out", overwrite=False) as partial,
        ):
            (partial / "big").write_bytes(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_has_the_permissions_that_the_umask_says(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        assert hysparse("convert", tiny_original, tmp_path / "out").exit_code == 0
        write_whole(tmp_path / "file", "x")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_file_half_written_by_a_killed_run_goes_with_the_next(tmp_path: Path) -> None:
    with whole_file(tmp_path / "page.html") as partial:
        recover(tmp_path / "page.html")
        assert partial.exists()
        partial.write_text("page")
    left = partial.with_name(partial.name.rpartition("-")[0] + "-4999999")
    left.write_text("half")
    write_whole(tmp_path / "page.html", "page")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_permissions_given_once_do_not_carry_over(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    given = {"overwrite": True, "trust_remote_code": True, "block_size": 32}
    options = load_section(ConvertOptions, None, None, given)
    path.write_text(to_yaml(options))
    kept = load_section(ConvertOptions, path)
    assert (kept.overwrite, kept.trust_remote_code, kept.block_size) == (False, False, 32)
    assert "resume" not in to_yaml(load_section(FinetuneOptions, None, None, {"resume": "auto"}))
    path.write_text("convert: {overwrite: true}\n")
    assert load_section(ConvertOptions, path).overwrite


@pytest.mark.parametrize("kind", ["html", "png", "npz", "lists"])
def test_inspect_topk_replaces_what_it_wrote_and_nothing_else(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, kind: str
) -> None:
    path, notes = tmp_path / "out", tmp_path / "notes.md"
    sizes = ("--pattern", "FSSF", "--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
    prompt = " ".join(f"w{i % 61}" for i in range(40))
    args = ("inspect-topk", tiny_original, "--prompt", prompt, *sizes, f"--{kind}")
    for _ in range(2):
        run = hysparse(*args, path)
        assert run.exit_code == 0, run.stderr
    notes.write_text("precious")
    for taken in (notes, tiny_original / "config.json", tiny_original / "new", "/dev/null"):
        run = hysparse(*args, taken)
        assert run.exit_code == 3 and run.stderr.count("\n") == 1 and run.stdout == ""
    assert notes.read_text() == "precious" and not (tiny_original / "new").exists()


def test_one_file_is_not_written_twice(tmp_path: Path) -> None:
    same = {"html": str(tmp_path / "x"), "png": str(tmp_path / "x")}
    with pytest.raises(InvalidRecipe, match="html is to be written there"):
        check_files("no-such-model", InspectOptions(**same))


@pytest.mark.parametrize("name", ["bench.json", "recipe.yaml", "memory.png", "decode-batch-1.png"])
def test_bench_replaces_no_results_of_others(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text('{"schema": "mine"}')
    run = hysparse("bench", tiny_original, "--context", 24, "--output", tmp_path)
    assert run.exit_code == 3 and name in run.stderr and run.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_results_are_replaced_by_those_of_the_same_command(tmp_path: Path) -> None:
    for name in ("eval.json", "eval.csv"):
        (tmp_path / name).write_text(json.dumps({"schema": "hysparse.eval/1"}))
    prepare_results(tmp_path, "eval.json", "hysparse.eval/", ["*.csv"])
    with pytest.raises(InvalidRecipe, match=r"eval\.json is not what this command wrote"):
        prepare_results(tmp_path, "eval.json", "hysparse.bench/", ["*.csv"])
