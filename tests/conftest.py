"""Fixtures for all tests: the command line, a tiny checkpoint, and real ones where they are."""

import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# A shell that starts a job in the background makes it ignore interrupts, and what it starts too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SAMPLE_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY_WORDS = ["<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


@dataclass(frozen=True)
class Run:
    exit_code: int
    stdout: str
    stderr: str


Hysparse = Callable[..., Run]


@pytest.fixture
def hysparse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hysparse:
    """The ``hysparse`` command, run in this process through its real boundary."""
    from hysparse_cli.cli import main

    # on a busy machine much takes longer than the patience after which a log gets lines
    monkeypatch.setattr("hysparse_cli.progress.PATIENCE_SECONDS", 3600.0)

    def run(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["hysparse", *map(str, args)])
        monkeypatch.setenv("PYTHONSAFEPATH", "")  # which main sets, is restored after the test
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Run(int(stop.value.code or 0), captured.out, captured.err)

    return run


def _sample(name: str) -> Path:
    path = SAMPLE_DATA / name
    if not path.exists():
        pytest.skip(f"needs the sample data, which is not here: ../shared/data/{name}")
    return path


@pytest.fixture(scope="session")
def stories_260k() -> Path:
    """A real dense checkpoint: llama, 0.26M parameters, float32, one shard."""
    return _sample("stories-260k")


@pytest.fixture(scope="session")
def novels_25m() -> Path:
    """A real dense checkpoint: qwen3, 25M parameters, bfloat16, five shards."""
    return _sample("novels-25m")


@pytest.fixture(scope="session")
def gutenberg_dev() -> Path:
    """Books that novels-25m was not trained on, as .jsonl.xz."""
    return _sample("gutenberg-dev.jsonl.xz")


@pytest.fixture(scope="session")
def novels_text() -> Path:
    """Books that novels-25m was trained on, as .jsonl.xz."""
    return _sample("novels.jsonl.xz")


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense qwen3 of 4 layers with a word tokenizer, sharded: do not change it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    words = {word: i for i, word in enumerate(TINY_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size="30KB")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_checkpoint(tiny_original: Path, tmp_path: Path) -> Path:
    """A copy of the tiny dense checkpoint, to do with as a test likes."""
    return Path(shutil.copytree(tiny_original, tmp_path / "tiny"))


@pytest.fixture
def tiny_converted(hysparse: Hysparse, tiny_original: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint as FSSF, in blocks of 8, two of them selected, and a window of 8."""
    out = tmp_path / "converted"
    sizes = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
    assert hysparse("convert", tiny_original, out, "--pattern", "FSSF", *sizes).exit_code == 0
    return out
