"""The command line's boundary: exit codes, one line for each error, and a quick --help."""

import resource
import subprocess
import sys

import pytest

import hysparse_cli
from hysparse_cli.cli.shared import show
from hysparse_cli.progress import progress
from tests.conftest import Hysparse

HELP_SECONDS = 0.35
COMMANDS = ("convert", "eval", "finetune", "generate", "bench", "inspect-topk", "doctor")
COMMAND = [sys.executable, "-c", "from hysparse_cli.cli import main; main()"]


def test_help_is_quick_and_imports_no_torch() -> None:
    check = (
        "import sys; sys.argv = ['hysparse', '--help']\n"
        "import atexit; from hysparse_cli.cli import main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic'}\n"
        "atexit.register(lambda: sys.stderr.write(str(heavy & set(sys.modules))))\n"
        "main()"
    )
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "set()") and "convert" in run.stdout
    # processor time: on an idle machine the time on the clock, on a busy one steadier than that
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < HELP_SECONDS, times


def test_version(hysparse: Hysparse) -> None:
    run = hysparse("--version")
    assert (run.exit_code, run.stdout) == (0, f"hysparse {hysparse_cli.__version__}\n")


def test_help_shows_defaults_and_cuts_nothing(
    hysparse: Hysparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = {name: hysparse(name, "--help").stdout for name in COMMANDS}
    commands = hysparse("--help").stdout.partition("Commands:")[2]
    assert all(name in commands for name in COMMANDS) and "..." not in commands
    for text in shown.values():
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "layers of a dense model. [default: 1:3]" in " ".join(shown["bench"].split())
    assert "--last-layer-full / --no-last-layer-full" in shown["bench"]


def test_wrong_usage_exits_2(hysparse: Hysparse) -> None:
    assert hysparse("convert").exit_code == 2
    assert hysparse("convert", "a", "b", "--no-such-flag").exit_code == 2
    assert hysparse("no-such-command").exit_code == 2


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (MemoryError(), 5, "hysparse: out of memory\n"),
        (KeyboardInterrupt(), 130, "hysparse: interrupted; nothing half written is left\n"),
    ],
)
def test_whatever_escapes_a_command_is_one_line(
    hysparse: Hysparse,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    exit_code: int,
    line: str,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("hysparse_cli.files.source.locate", fail)
    run = hysparse("convert", "a", "b")
    assert (run.exit_code, run.stderr) == (exit_code, line)


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_line_unless_debug_is_asked_for(debug: bool) -> None:
    words = ["hysparse", *(["--debug"] if debug else []), "convert", "a", "b"]
    program = f"""import sys
from hysparse_cli import cli
from hysparse_cli.files import source
def fail(*args, **options):
    raise RuntimeError("two\\nlines")
source.locate = fail
sys.argv = {words}
cli.main()"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and ("Traceback" in run.stderr) is debug
    line = "hysparse: bug, please report it (traceback with --debug): RuntimeError: two lines\n"
    assert debug or run.stderr == line


def test_a_traceback_is_shown_only_with_debug(hysparse: Hysparse) -> None:
    quiet, loud = hysparse("convert", "./a", "b"), hysparse("--debug", "convert", "./a", "b")
    assert quiet.exit_code == loud.exit_code == 7
    assert "Traceback" not in quiet.stderr and "Traceback" in loud.stderr


def test_a_bar_appears_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copying") as advance:
        advance(1, 2)
    assert capsys.readouterr() == ("", "")


def test_brackets_in_what_is_shown_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    class Result:
        def table(self) -> str:
            return "refused: q is on [cpu] :warning:"

    show(Result(), as_json=False)
    assert capsys.readouterr().out == "refused: q is on [cpu] :warning:\n"
