"""What surrounds the command: streams, limits, letters and folders that are not as they should."""

import ast
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hysparse_cli.cli.shared import show
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.files.reading import parse_json, parse_yaml, read_json
from hysparse_cli.printable import cells, printable
from tests.conftest import Hysparse

COMMAND = [sys.executable, "-c", "from hysparse_cli.cli import main; main()"]
HOSTILE = "\x1b[31mred\x07\n\u202etxt.exe\u2028\ud800" + "x" * 100_000


def run(*args: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([*COMMAND, *map(str, args)], text=True, check=False, **given)


def shell(line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """``line`` with $HYSPARSE as the command."""
    words = f"{sys.executable} -c 'from hysparse_cli.cli import main; main()'"
    return subprocess.run(
        ["bash", "-c", line.replace("$HYSPARSE", words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def limited(limit: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def test_a_full_stdout_is_exit_5_and_one_line() -> None:
    with open("/dev/full", "w") as full:
        for args in (("--help",), ("convert", "--help")):
            ended = run(*args, stdout=full)
            assert ended.returncode == 5 and "No space left on device" in ended.stderr
            assert len(ended.stderr.splitlines()) == 1


def test_a_full_stderr_changes_no_exit_code() -> None:
    with open("/dev/full", "w") as full:
        assert run("convert", "./absent", "out", stderr=full).returncode == 7


def test_a_reader_that_leaves_is_no_error(tiny_original: Path, tmp_path: Path) -> None:
    line = f"$HYSPARSE convert {tiny_original} {tmp_path}/out --dry-run | true"
    ended = shell(f"{line}; echo ${{PIPESTATUS[0]}}")
    assert ended.stdout == f"{128 + signal.SIGPIPE}\n" and "hysparse:" not in ended.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing_that_is_written(
    tiny_original: Path, tmp_path: Path, closed: str
) -> None:
    assert shell(f"$HYSPARSE convert {tiny_original} {tmp_path}/out {closed}").returncode == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_ascii_locale_prints_tables_and_refuses_other_letters(
    tiny_original: Path, tmp_path: Path
) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = shell(f"$HYSPARSE convert {tiny_original} {tmp_path}/out", **plain)
    assert ended.returncode == 0 and "full, serves 1-2" in ended.stdout
    assert (tmp_path / "out" / "README.md").is_file()
    ended = shell(f"$HYSPARSE convert {tiny_original} {tmp_path}/größe", **plain)
    assert ended.returncode == 2 and "LC_ALL=C.UTF-8" in ended.stderr


def test_a_working_directory_that_was_removed_is_exit_7(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    ended = shell(f"mkdir {gone}; cd {gone}; rmdir {gone}; $HYSPARSE generate model")
    assert ended.returncode == 7 and "working directory is no longer there" in ended.stderr


@pytest.mark.parametrize(
    ("limit", "value"), [(resource.RLIMIT_AS, 600_000_000), (resource.RLIMIT_NOFILE, 12)]
)
def test_limits_that_no_library_stands_are_exit_5(limit: int, value: int) -> None:
    ended = run("generate", "model", preexec_fn=limited(limit, value))
    assert ended.returncode == 5 and f"{value:,}" in ended.stderr


def test_names_too_long_for_the_system_are_cut_in_the_message(hysparse: Hysparse) -> None:
    long = "n" * 5000
    assert hysparse("convert", long, "out").exit_code == 7
    for args in (("convert", long, "out"), ("eval", "./a", "--recipe", long)):
        ended = hysparse(*args)
        assert ended.exit_code == 7 and len(ended.stderr) < 1000, ended.stderr


def test_a_symlink_that_leads_to_itself_is_exit_7(hysparse: Hysparse, tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to(loop)
    assert hysparse("convert", loop, tmp_path / "out").exit_code == 7
    assert hysparse("eval", tmp_path, "--recipe", loop).exit_code == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_an_interrupt_with_its_own_exit_code(number: int) -> None:
    program = (
        "import os, signal\nfrom hysparse_cli import cli\nfrom hysparse_cli.files import source\n"
        f"def stop(*args, **options):\n    os.kill(os.getpid(), {int(number)})\n"
        "    while True: pass\nsource.locate = stop\nimport sys\n"
        "sys.argv = ['hysparse', 'convert', 'a', 'b']\ncli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 128 + number
    assert ended.stderr == "hysparse: interrupted; nothing half written is left\n"


def test_what_a_file_holds_reaches_no_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    class Result:
        def table(self) -> Any:
            from rich.table import Table

            table = Table("name", title=HOSTILE[:30])
            table.add_row(HOSTILE[:30])
            return table

    shown = printable(HOSTILE)
    assert shown.isprintable() and len(shown) < 400 and shown.startswith("\\x1b[31mred\\x07\\n")
    assert cells("a\x1bb\nc") == "a\N{REPLACEMENT CHARACTER}b\nc"
    show(Result(), as_json=False)
    drawn = capsys.readouterr().out
    assert "red" in drawn and drawn.replace("\n", "").isprintable()


def test_json_and_yaml_have_limits(tmp_path: Path) -> None:
    for raw in ("[" * 100_000, '{"a": ' * 100_000, "1" * 5000, "{", b"\xff\xfe"):
        with pytest.raises(UnreadableInput, match="file"):
            parse_json(raw, "file")
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "file") == {"a": 1}
    (tmp_path / "large.json").write_bytes(b" " * ((64 << 20) + 1))
    with pytest.raises(UnreadableInput, match="larger than"):
        read_json(tmp_path / "large.json")
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
    for raw in (bomb, "[" * 100_000, "a: " + "1" * 5000, "!!python/object/apply:os.system [id]"):
        with pytest.raises(InvalidRecipe, match="recipe"):
            parse_yaml(raw, "recipe")


def test_text_files_are_opened_in_utf_8() -> None:
    package = Path(__file__).parents[2] / "hysparse_cli"
    calls = [
        (path.name, ast.unparse(call))
        for path in package.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read_text", "write_text")
        and not ast.unparse(call.func).startswith("distribution")  # of a package
    ]
    assert calls and [call for call in calls if "encoding='utf-8'" not in call[1]] == []
