"""Nothing of a checkpoint runs without --trust-remote-code, whatever stdin says (a sample; all of
tests/code_traps.py are sprung in tests/long/)."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.files.config_json import without_switches
from hysparse_cli.files.foreign import check_code
from hysparse_cli.model.config import HUB_SHIM_NAME
from tests.code_traps import CODE, KERNELS, REFUSED, change, own_code
from tests.conftest import Hysparse

FLAG = "--trust-remote-code"
SIZES = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
CALIBRATED = ("--calibration-tokens", 128, "--set", "convert.calibration_sequence_tokens=64")
TRAINS = ("--steps", 1, "--batch-size", 1, "--sequence-tokens", 32)
SHORT = ("--prompt", "w1 w2", "--max-new-tokens", 2)
SHADOWED = (
    *("random", "json", "torch", "typing", "numpy", "transformers", "multiprocessing", "runpy"),
    *("hysparse_cli", "hysparse_kernels", "jinja2", "wrapt", "pathlib"),
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 61}" for i in range(300)))
    return path


def commands(model: Path, student: Path, text: Path, out: Path) -> dict[str, list[object]]:
    measured = ("--strategy", "dp", "--ratio", "1:1", "--calibration", text, *CALIBRATED)
    trained = ("--data", text, *TRAINS)
    return {
        "convert": ["convert", model, out / "new", *SIZES, *measured],
        "eval": ["eval", model, "--data", text, "--sequence-tokens", 32],
        "finetune": ["finetune", model, out / "tuned", *trained],
        "teacher": ["finetune", student, out / "taught", "--teacher", model, *trained],
        "generate": ["generate", model, *SHORT],
        "bench": ["bench", model, "--context", 64],
        "bench --config": ["bench", "--config", model, "--context", 64],
        "bench --against": ["bench", student, "--against", model, "--context", 64],
        "inspect-topk": ["inspect-topk", model, "--prompt", "w1 w2 w3", *SIZES],
    }


@pytest.mark.parametrize(
    "trap",
    [
        *("config: AutoModelForCausalLM", "tokenizer: both", "tokenizer: legacy list"),
        *("unknown family: both", "unknown family: tokenizer", "custom_generate"),
    ],
)
def test_every_command_refuses_code_whatever_stdin_says(
    hysparse: Hysparse,
    tiny_checkpoint: Path,
    tiny_converted: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trap: str,
) -> None:
    sentinel = tmp_path / "sentinel"
    REFUSED[trap](tiny_checkpoint, sentinel)
    for name, args in commands(tiny_checkpoint, tiny_converted, text, tmp_path).items():
        stdin = io.StringIO("y\n")
        monkeypatch.setattr(sys, "stdin", stdin)
        run = hysparse(*args)
        assert (run.exit_code, run.stderr.count("\n")) == (7, 1), (name, run.stderr)
        assert FLAG in run.stderr
        assert not sentinel.exists() and stdin.read() == "y\n"


@pytest.mark.parametrize("trap", REFUSED.values(), ids=REFUSED)
def test_all_that_brings_code_is_found(tiny_checkpoint: Path, trap: object) -> None:
    trap(tiny_checkpoint, tiny_checkpoint / "sentinel")  # type: ignore[operator]
    check_code(tiny_checkpoint, trust_remote_code=True)
    with pytest.raises(UnreadableInput, match=FLAG):
        check_code(tiny_checkpoint, trust_remote_code=False)


def test_with_the_flag_a_tokenizers_code_runs_in_every_command(
    hysparse: Hysparse, tiny_checkpoint: Path, tiny_converted: Path, text: Path, tmp_path: Path
) -> None:
    sentinel = tmp_path / "sentinel"
    REFUSED["tokenizer: both"](tiny_checkpoint, sentinel)
    for name, args in commands(tiny_checkpoint, tiny_converted, text, tmp_path).items():
        if name.startswith("bench"):  # whose processes take long to start
            continue
        sentinel.unlink(missing_ok=True)
        for module in [m for m in sys.modules if m.startswith("transformers_modules.")]:
            del sys.modules[module]
        run = hysparse(*args, FLAG)
        assert run.exit_code == 0, (name, run.stderr)
        assert sentinel.exists(), name


def test_a_family_that_is_unknown_and_brings_no_code_is_not_supported(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    change(tiny_checkpoint / "config.json", model_type="trap")
    for args in (
        ["convert", tiny_checkpoint, tmp_path / "out"],
        ["generate", tiny_checkpoint, *SHORT],
    ):
        run = hysparse(*args, *SHORT) if args[0] == "generate" else hysparse(*args)
        assert run.exit_code == 4, run.stderr


@pytest.mark.parametrize("trusted", [(), (FLAG,)], ids=["untrusted", "trusted"])
def test_a_converted_checkpoints_shim_is_neither_refused_nor_run(
    hysparse: Hysparse, tiny_converted: Path, tmp_path: Path, trusted: tuple[str, ...]
) -> None:
    own_code(tiny_converted, tmp_path / "sentinel", HUB_SHIM_NAME)
    run = hysparse("generate", tiny_converted, *SHORT, *trusted)
    assert run.exit_code == 0, run.stderr
    assert not (tmp_path / "sentinel").exists()


def test_finetuning_keeps_code_that_is_trusted(
    hysparse: Hysparse, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    REFUSED["tokenizer: both"](tiny_checkpoint, tmp_path / "sentinel")
    out = tmp_path / "out"
    assert hysparse("finetune", tiny_checkpoint, out, "--data", text, *TRAINS, FLAG).exit_code == 0
    assert (out / "own.py").read_text() == CODE.format(sentinel=str(tmp_path / "sentinel"))
    assert hysparse("generate", out, *SHORT).exit_code == 7
    assert hysparse("generate", out, *SHORT, FLAG).exit_code == 0


@pytest.mark.parametrize("converted", [False, True], ids=["dense", "converted"])
def test_a_kernel_that_a_config_names_is_never_chosen(
    hysparse: Hysparse, tiny_checkpoint: Path, tiny_converted: Path, converted: bool
) -> None:
    folder = tiny_converted if converted else tiny_checkpoint
    plain = hysparse("generate", folder, *SHORT)
    # transformers would take this one from the hub, too, where flash_attn is not installed
    change(folder / "config.json", **KERNELS["_attn_implementation=flash_attention_2"])
    change(folder / "config.json", **KERNELS["use_kernels"])
    ignored = hysparse("generate", folder, *SHORT)
    assert (ignored.exit_code, ignored.stdout) == (0, plain.stdout), ignored.stderr
    change(folder / "config.json", **KERNELS["_attn_implementation=kernels-community/flash-attn2"])
    assert hysparse("generate", folder, *SHORT).exit_code == 4


def test_a_choice_of_kernels_is_taken_out_of_every_part() -> None:
    named = {"_attn_implementation": "a/b", "vocab_size": 3, "text_config": {"x": 1}}
    inner = {"experts_implementation": "a/b", "x": 1}
    assert without_switches(named | {"text_config": inner}) == {
        "vocab_size": 3,
        "text_config": {"x": 1},
    }


def test_an_adapter_is_not_loaded_in_silence(hysparse: Hysparse, tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    run = hysparse("generate", tiny_checkpoint, *SHORT)
    assert run.exit_code == 7 and "adapter" in run.stderr


@pytest.mark.parametrize("fields", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}])
def test_a_way_of_decoding_is_not_fetched(
    hysparse: Hysparse, tiny_checkpoint: Path, fields: dict[str, object]
) -> None:
    change(tiny_checkpoint / "generation_config.json", **fields)
    run = hysparse("generate", tiny_checkpoint, *SHORT)
    assert run.exit_code == 7 and "generation_config.json" in run.stderr


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "AutoModelForCausalLM", "Trainer"])
def test_a_tokenizer_class_is_a_tokenizer(
    hysparse: Hysparse, tiny_checkpoint: Path, name: str
) -> None:
    change(tiny_checkpoint / "tokenizer_config.json", tokenizer_class=name)
    assert hysparse("generate", tiny_checkpoint, *SHORT).exit_code in (0, 7)


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A working directory with modules of common names, each of which leaves a mark."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in SHADOWED:
        mark = folder / f"{name}.ran"
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    return folder


def installed(tmp_path: Path) -> list[str]:
    """What pip installs as ``hysparse``: a script, whose folder Python looks into and not the
    working directory."""
    script = tmp_path / "bin" / "hysparse"
    script.parent.mkdir()
    script.write_text(
        "import sys\nfrom hysparse_cli.cli import main\nif __name__ == '__main__':\n    main()\n"
    )
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    "command",
    [*(pytest.param(n, marks=pytest.mark.long) for n in ("bench", "finetune")), "generate"],
)
def test_modules_of_the_working_directory_are_not_imported(
    hostile_folder: Path, tiny_original: Path, text: Path, tmp_path: Path, command: str
) -> None:
    args = {
        "bench": ["bench", tiny_original, "--phases", "decode", "--subjects", "dense"],
        "finetune": ["finetune", tiny_original, "out", "--data", text, *TRAINS],
        "generate": ["generate", tiny_original, *SHORT, "--chat"],
    }[command]
    args += {
        "bench": ["--context", 64, "--repeat", 1, "--warmup", 0],
        "finetune": ["--nproc-per-node", 2, "--set", "finetune.gradient_accumulation=2"],
        "generate": [],
    }[command]
    done = subprocess.run(
        [*installed(tmp_path), *map(str, args)], cwd=hostile_folder, capture_output=True, text=True
    )
    assert [path.name for path in hostile_folder.glob("*.ran")] == []
    assert done.returncode == 0, done.stderr
