"""The commit in a bench's stamp: of the install, of this checkout, never of another project's."""

import json
import re
import shutil
import subprocess
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from hysparse_cli.bench import environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Installed(Distribution):
    """What pip leaves of an install from a repository (PEP 610)."""

    def __init__(self, direct_url: str | None):
        self.direct_url = direct_url

    def read_text(self, filename: str) -> str | None:
        return self.direct_url if filename == "direct_url.json" else None

    def locate_file(self, path: object) -> Path:
        raise AssertionError("no file is looked for")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one commit, with a file of the stamp's name that git does not track."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    said = ["commit", "--quiet", "--allow-empty", "--message", "Begin"]
    subprocess.run(["git", "-C", tmp_path, *author, *said], check=True)
    shutil.copy(environment.__file__, tmp_path)
    return tmp_path


def stamped(monkeypatch: pytest.MonkeyPatch, direct_url: str | None, folder: Path) -> str | None:
    monkeypatch.setattr(environment, "distribution", lambda name: Installed(direct_url))
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    return environment._commit()


def test_an_install_from_a_repository_knows_its_commit(
    monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    direct_url = json.dumps({"url": "there", "vcs_info": {"vcs": "git", "commit_id": COMMIT}})
    assert stamped(monkeypatch, direct_url, checkout) == COMMIT[:12]


def test_a_checkout_is_ours_only_where_git_tracks_the_code(
    monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    editable = json.dumps({"url": "here", "dir_info": {"editable": True}})
    assert stamped(monkeypatch, editable, checkout) is None
    subprocess.run(["git", "-C", checkout, "add", "environment.py"], check=True)
    assert re.fullmatch("[0-9a-f]{12}-dirty", str(stamped(monkeypatch, editable, checkout)))
    assert stamped(monkeypatch, None, checkout.parent) is None
