"""The wheel holds the tool and its kernels, and nothing that only a checkout needs."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHIPPED = ["hysparse_cli", "kernels/hysparse_kernels"]


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, at its head or later."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_the_wheel_is_made_of_two_packages() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": SHIPPED}
    assert not any((ROOT / package / "benchmarks").exists() for package in SHIPPED)


def test_what_is_shipped_imports_nothing_that_is_not() -> None:
    files = [path for package in SHIPPED for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    importers = {path.name for path in files if imported(path) & {"benchmarks", "tests"}}
    assert importers == set()
    benchmarks = {name for p in (ROOT / "kernels/benchmarks").glob("*.py") for name in imported(p)}
    assert {"hysparse_cli", "hysparse_kernels"} <= benchmarks  # as it should be, the other way
