"""The package in a source tree that nobody has installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def python(tmp_path: Path) -> list[str]:
    """A Python that has every package of this one but hysparse."""
    packages = tmp_path / "packages"
    packages.mkdir()
    places = [Path(place) for place in sys.path if Path(place).name == "site-packages"]
    for entry in (entry for place in places for entry in place.iterdir()):
        if "hysparse" not in entry.name and not (packages / entry.name).is_symlink():
            (packages / entry.name).symlink_to(entry)
    begin = (
        f"import sys; sys.path[:0] = [sys.argv.pop(1), {str(packages)!r}]\nexec(sys.argv.pop(1))"
    )
    return [sys.executable, "-I", "-S", "-c", begin]


def copy_tree(tmp_path: Path, *parts: str) -> Path:
    tree = tmp_path / "tree"
    for part in parts:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def test_a_source_tree_works_and_its_version_is_unknown(
    python: list[str], tiny_original: Path, tmp_path: Path
) -> None:
    tree, out = copy_tree(tmp_path, "hysparse_cli", "kernels"), tmp_path / "out"
    code = (
        "import hysparse_cli; print(hysparse_cli.__version__)\n"
        "from transformers import AutoModelForCausalLM\n"
        "from hysparse_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[3])).__name__)"
    )
    words = [str(tree), code, "convert", str(tiny_original), str(out)]
    run = subprocess.run([*python, *words], capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert (lines[0], lines[-1]) == ("0+unknown", "HySparseQwen3ForCausalLM")
    versions = json.loads((out / "hysparse_report.json").read_text())["versions"]
    assert versions["hysparse"] == "0+unknown" and versions["torch"]


def test_a_tree_without_kernels_says_so(python: list[str], tmp_path: Path) -> None:
    tree = copy_tree(tmp_path, "hysparse_cli")
    words = [*python, str(tree), "import hysparse_cli"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.stderr.splitlines()[-1] == (
        "ImportError: hysparse_cli is not installed, and hysparse_kernels is not in kernels/ "
        "beside it: install both with pip install ."
    )
