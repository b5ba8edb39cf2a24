"""No file that a user may be handed runs as code: over 100 traps, in each way that commands load.

Which traps there are: tests/code_traps.py; how they are sprung quickly: tests/forked.py.
"""

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from tests.code_traps import (
    INERT,
    REFUSED,
    TEMPLATES,
    Trap,
    change,
    evil_pickle,
    own_code,
    put_template,
)
from tests.forked import Forks

pytestmark = pytest.mark.long

OURS = {0, 3, 4, 5, 6, 7}  # what a command may exit with
FLAG = "--trust-remote-code"
SECONDS = 10  # of the processor, for anything
SIZES = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
CALIBRATED = ("--calibration-tokens", 128, "--set", "convert.calibration_sequence_tokens=64")
TRAINS = ("--steps", 1, "--batch-size", 1, "--sequence-tokens", 32)


class Place:
    """A checkpoint to put a trap into, and what all commands need beside it."""

    def __init__(self, folder: Path, original: Path, forks: Forks):
        self.folder, self.forks = folder, forks
        self.sentinel = folder / "sentinel"
        self.model, self.student = folder / "model", folder / "student"
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(f"w{i % 61}" for i in range(600)))
        shutil.copytree(original, self.model)

    def commands(self) -> dict[str, list[object]]:
        model, text = self.model, self.text
        trained = ("--data", text, *TRAINS, "--overwrite")
        measured = ("--strategy", "dp", "--ratio", "1:1", "--calibration", text, *CALIBRATED)
        return {
            "convert": ["convert", model, self.folder / "plain", *SIZES, "--overwrite"],
            "convert dp": ["convert", model, self.folder / "dp", *SIZES, *measured, "--overwrite"],
            "eval": ["eval", model, "--data", text, "--sequence-tokens", 32],
            "finetune": ["finetune", model, self.folder / "tuned", *trained],
            "teacher": ["finetune", self.student, self.folder / "t", "--teacher", model, *trained],
            "generate": ["generate", model, "--prompt", "w1 w2", "--max-new-tokens", 2, "--chat"],
            "bench": ["bench", model, "--phases", "decode", "--context", 64, "--repeat", 1],
            "inspect-topk": ["inspect-topk", model, "--prompt", "w1 w2 w3", *SIZES],
        }

    def run(self, args: list[object]) -> tuple[int, str]:
        """Exit code and output, where nothing ran, nothing was fetched and it did not take long."""
        outcome = self.forks.run(args, cwd=self.folder, offline=True)
        code, output = outcome.exit_code, outcome.stdout + outcome.stderr
        assert not self.sentinel.exists(), f"{args} ran it: {output}"
        assert code in OURS, f"{args}: exit {code}: {output}"
        assert "[y/N]" not in output
        assert outcome.seconds < SECONDS, f"{args}: {outcome.seconds} s: {output}"
        return code, output


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as served:
        yield served


@pytest.fixture
def place(tmp_path: Path, tiny_original: Path, forks: Forks, student: Path) -> Place:
    found = Place(tmp_path, tiny_original, forks)
    shutil.copytree(student, found.student)
    return found


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_original: Path, forks: Forks) -> Path:
    folder = tmp_path_factory.mktemp("student")
    made = Place(folder, tiny_original, forks)
    out = folder / "converted"
    code, output = made.run(["convert", made.model, out, "--pattern", "FSSF", *SIZES])
    assert code == 0, output
    return out


@pytest.mark.parametrize("trap", REFUSED.values(), ids=REFUSED)
def test_code_is_refused_by_every_command_whatever_stdin_says(place: Place, trap: Trap) -> None:
    trap(place.model, place.sentinel)
    for command in place.commands().values():
        code, output = place.run(command)
        assert (code, output.count("\n")) == (7, 1), output
        assert FLAG in output


@pytest.mark.parametrize("name", INERT)
def test_other_files_run_nothing(place: Place, name: str) -> None:
    INERT[name](place.model, place.sentinel)
    for command, args in place.commands().items():
        if command != "bench" or name.startswith(("kernel", "another", "only", "an adapter")):
            place.run(args)


@pytest.mark.parametrize("name", [n for n in INERT if n.startswith("beside")])
def test_code_that_nothing_names_is_not_run_where_code_is_trusted_either(
    place: Place, name: str
) -> None:
    INERT[name](place.model, place.sentinel)
    for command in ("generate", "eval", "convert"):
        code, output = place.run([*place.commands()[command], FLAG])
        assert code == 0, output


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_does_nothing_but_render(place: Place, template: str) -> None:
    put_template(place.model, template, place.sentinel)
    code, output = place.run(place.commands()["generate"])
    assert code in (0, 7), output


@pytest.mark.parametrize("trusted", [(), (FLAG,)], ids=["untrusted", "trusted"])
def test_the_hub_shim_of_a_converted_checkpoint_is_never_run(
    place: Place, trusted: tuple[str, ...]
) -> None:
    own_code(place.student, place.sentinel, "hysparse_hub.py")
    shutil.rmtree(place.model)
    place.student.rename(place.model)
    for name, args in place.commands().items():
        if name not in ("convert", "convert dp", "teacher", "bench"):
            code, output = place.run([arg for arg in args if arg not in SIZES] + [*trusted])
            assert code == 0, f"{name}: {output}"


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_a_converted_checkpoint_that_names_more_than_its_shim_is_refused(
    place: Place, name: str
) -> None:
    own_code(place.student, place.sentinel)
    change(place.student / "config.json", auto_map={name: "own.Config"})
    code, output = place.run(["generate", place.student, "--prompt", "w1"])
    assert code == 7 and FLAG in output


def _table(entry: Any) -> Callable[[Path, Path], None]:
    def trap(state: Path, sentinel: Path) -> None:
        (state / ".metadata").write_bytes(entry(sentinel))

    return trap


def _bytes_entry(state: Path, sentinel: Path) -> None:
    """A tensor said to be bytes, which torch unpickles without limits."""
    table: Metadata = pickle.loads((state / ".metadata").read_bytes())
    name = next(iter(table.state_dict_metadata))
    place = next(p for i, p in table.storage_data.items() if i.fqn == name)
    table.state_dict_metadata[name] = BytesStorageMetadata()
    table.storage_data[MetadataIndex(name)] = place
    (state / ".metadata").write_bytes(pickle.dumps(table))
    _evil_tensors(state, sentinel)


def _evil_tensors(state: Path, sentinel: Path) -> None:
    for path in state.glob("*.distcp"):
        path.write_bytes(evil_pickle(sentinel))


def _evil_facts(state: Path, sentinel: Path) -> None:
    (state / "run.pt").write_bytes(evil_pickle(sentinel))


def _evil_saved_facts(state: Path, sentinel: Path) -> None:
    from tests.code_traps import Shell

    torch.save({"format": 2, "run": Shell(sentinel)}, state / "run.pt")


STATES: dict[str, Callable[[Path, Path], None]] = {
    "system": _table(evil_pickle),
    "eval": _table(lambda sentinel: f"cbuiltins\neval\n(S\"open('{sentinel}','w')\"\ntR.".encode()),
    "import": _table(lambda sentinel: b"cbuiltins\n__import__\n(S'own'\ntR."),
    "getattr": _table(lambda sentinel: b"cbuiltins\ngetattr\n(ctorch\nload\nS'x'\ntR."),
    "load": _table(lambda sentinel: b"ctorch\nload\n(S'run.pt'\ntR."),
    "dotted": _table(lambda sentinel: b"\x80\x04\x8c\x05torch\x8c\tos.system\x93."),
    "extension": _table(lambda sentinel: b"\x80\x02\x82\x01."),
    "deep": _table(lambda sentinel: b"\x80\x02" + b"(" * 1_000_000 + b"."),
    "huge memo": _table(lambda sentinel: b"\x80\x02Nr\xff\xff\xff\x7f."),
    "huge bytes": _table(lambda sentinel: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f."),
    "nothing": _table(lambda sentinel: b""),
    "bytes for a tensor": _bytes_entry,
    "tensors": _evil_tensors,
    "facts": _evil_facts,
    "saved facts": _evil_saved_facts,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_original: Path, forks: Forks) -> Place:
    """A run that has saved its state and not finished."""
    folder = tmp_path_factory.mktemp("stopped")
    made = Place(folder, tiny_original, forks)
    args = ["finetune", made.model, folder / "tuned", "--data", made.text, *TRAINS]
    args[args.index("--steps") + 1] = 200
    args += ["--save-every-steps", 1]
    outcome = forks.run(args, cwd=folder, offline=True, until="tuned.state/step-*")
    assert (folder / "tuned.state").is_dir(), outcome
    return made


@pytest.mark.parametrize("trap", STATES.values(), ids=STATES)
def test_a_saved_state_runs_nothing(stopped: Place, tmp_path: Path, trap: Any) -> None:
    state = tmp_path / "tuned.state"
    shutil.copytree(stopped.folder / "tuned.state", state)
    step = next(state.glob("step-*"))
    own_code(tmp_path, stopped.sentinel)
    trap(step, stopped.sentinel)
    args = ["finetune", stopped.model, tmp_path / "tuned", "--data", stopped.text, *TRAINS]
    args[args.index("--steps") + 1] = 200
    code, output = stopped.run([*args, "--save-every-steps", 1, "--resume", "auto"])
    assert code == 7, output


RECIPES = {
    "apply": "generate: !!python/object/apply:os.system ['touch {sentinel}']",
    "new": "generate: !!python/object/new:os.system ['touch {sentinel}']",
    "name": "generate: {{prompt: !!python/name:os.system }}",
    "module": "generate: {{prompt: !!python/module:own }}",
    "object": "generate: !!python/object:own.Config {{}}",
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_runs_nothing(place: Place, recipe: str) -> None:
    own_code(place.folder, place.sentinel)
    path = place.folder / "recipe.yaml"
    path.write_text(recipe.format(sentinel=place.sentinel))
    value = recipe.format(sentinel=place.sentinel).partition(": ")[2]
    for args in place.commands().values():
        assert place.run([*args, "--recipe", path])[0] == 3
        assert place.run([*args, "--set", f"generate.prompt={value}"])[0] == 3


def test_files_that_commands_go_on_from_are_read_as_data(place: Place) -> None:
    raw = evil_pickle(place.sentinel)
    for name in ("scores", "lists", "rows.jsonl", "finished.jsonl", "result.json", "text"):
        (place.folder / name).write_bytes(raw)
    folder, commands = place.folder, place.commands()
    runs: list[list[object]] = [
        [*commands["convert dp"], "--scores", folder / "scores"],
        [*commands["bench"], "--lists", folder / "lists"],
        [*commands["bench"], "--output", folder],
        [*commands["eval"], "--output", folder],
        [*commands["finetune"], "--data", folder / "text"],
        [*commands["convert dp"], "--calibration", folder / "text"],
    ]
    for args in runs:
        place.run(args)
