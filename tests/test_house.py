"""The house keeps its own rules: packaging traps, no machine's paths, a README that is true."""

import ast
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hysparse_cli.cli import app
from hysparse_cli.families import FAMILIES, REFUSED

ROOT = Path(__file__).parent.parent
PRINT_OR_EXIT = re.compile(
    r"\bprint\(|\bsys\.(?:stdout|stderr|exit)\b|\bos\._exit\b|\bSystemExit\b|\bConsole\([^)]*\)"
)
MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:work|root|home|Users|mnt|opt|tmp)/\w")


def project_files() -> list[Path]:
    """The files that git would ship: what it tracks, and what it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def documented_commands() -> list[list[str]]:
    """Every ``hysparse ...`` line of the code blocks that users read, continuation lines joined."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "commands").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line for line in words if line and line[0] == "hysparse"]


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def dead_links(document: Path) -> list[str]:
    """The relative links of a Markdown file that lead nowhere."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    return [target for target in targets if not (document.parent / target).exists()]


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_finds_the_real_kernels_package_from_the_repository_root() -> None:
    if not list(distributions(name="kernels")):  # importing it would find our folder
        pytest.skip("Hugging Face's package kernels is not installed")
    code = "import kernels, transformers; transformers.Qwen3ForCausalLM; print(kernels.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().endswith("__init__.py")
    assert not Path(found.stdout.strip()).is_relative_to(ROOT / "kernels")


def test_no_file_names_a_path_of_one_machine() -> None:
    named = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights
        named += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in MACHINE_PATH.finditer(text)]
    assert named == []


def test_only_the_command_line_prints_or_exits_and_progress_goes_to_stderr() -> None:
    shipped = ("hysparse_cli", "kernels/hysparse_kernels")
    code = [p for folder in shipped for p in (ROOT / folder).rglob("*.py")]
    found = [
        (p.relative_to(ROOT), hit) for p in code for hit in PRINT_OR_EXIT.findall(p.read_text())
    ]
    cli, progress = Path("hysparse_cli/cli"), Path("hysparse_cli/progress.py")
    assert any(path.is_relative_to(cli) for path, _ in found)
    assert {(path, hit) for path, hit in found if not path.is_relative_to(cli)} == {
        (progress, "sys.stderr"),
        (progress, "Console(file=_Stderr()"),
    }


def test_every_load_says_whether_code_may_run_and_reads_safetensors_alone() -> None:
    folders = ("hysparse_cli", "kernels", "examples")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    loads = 0
    for path in code:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr not in ("from_pretrained", "from_config"):
                continue
            loads += 1
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            assert "trust_remote_code" in given, where
            whose = ast.unparse(call.func.value)
            weightless = ("AutoTokenizer", "AutoConfig", "GenerationConfig")
            if call.func.attr == "from_pretrained" and whose not in weightless:
                assert ast.literal_eval(given["use_safetensors"]) is True, where
    assert loads >= 7


def test_numbered_examples_are_short() -> None:
    scripts = sorted((ROOT / "examples").glob("[0-9]*.py"))
    assert scripts
    assert {s.name: n for s in scripts if (n := len(s.read_text().splitlines())) > 60} == {}


def test_the_documents_show_every_command() -> None:
    shown = {command[1] for command in documented_commands()}
    assert shown == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_the_documents_name_the_families_that_run_and_those_refused() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    (row,) = re.findall(r"\| run \| refused \|\n\|.*\|\n\| (.*) \|", page)
    runs, refused = (cell.split(", ") for cell in row.split(" | "))
    assert runs == sorted(FAMILIES)
    # the text half of a multimodal family goes by the family's name
    assert refused == sorted(name for name in REFUSED if not name.endswith("_text"))


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_every_link_within_the_house_leads_somewhere(document: Path) -> None:
    assert dead_links(document) == []


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_every_documented_command_parses(command: list[str]) -> None:
    name, *words = command[1:]
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    group = get_command(app)
    known = {
        option
        for parameter in group.commands[name].made.params  # type: ignore[attr-defined]
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert [word for word in words if word.startswith("--") and word not in known] == []
