"""Reads what a measurement depends on: the machine, its clocks, the versions and the commit."""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from hysparse_cli import __version__
from hysparse_cli.devices import describe

HASH_DIGITS = 12
READINGS = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_celsius": "temperature.gpu",
    "power_watts": "power.draw",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit, None where one is not known."""
    found: dict[str, Any] = dict(describe(device)) | {"hysparse": __version__}
    found["commit"] = _commit()
    found["driver"] = _smi("driver_version") if device.type == "cuda" else None
    found["cuda"] = torch.version.cuda if device.type == "cuda" else None
    try:
        found["triton"] = version("triton")
    except ModuleNotFoundError:
        found["triton"] = None
    return found


def clocks(device: torch.device) -> dict[str, float] | None:
    """Clocks, temperature and power as nvidia-smi reads them now; None without a GPU or it."""
    values = _smi(",".join(READINGS.values())) if device.type == "cuda" else None
    if values is None:
        return None
    found = {}
    for name, value in zip(READINGS, values.split(","), strict=True):
        try:
            found[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return found


def _smi(fields: str) -> str | None:
    """Of the first GPU that this process may use."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible.split(',')[0]}")
    said = _output(command)
    return said.splitlines()[0].strip() if said else None


def _commit() -> str | None:
    """Of the repository that hysparse was installed from, or of the checkout that it runs in, with
    "-dirty" where that is changed; None without either."""
    if installed := _installed_from():
        commit: str | None = json.loads(installed).get("vcs_info", {}).get("commit_id")
        if commit is not None:
            return commit[:HASH_DIGITS]
    git = ["git", "-C", str(Path(__file__).parent)]
    if _output([*git, "ls-files", Path(__file__).name]) is None:  # some other project's checkout
        return None
    return _output([*git, "describe", "--always", "--dirty", f"--abbrev={HASH_DIGITS}"])


def _installed_from() -> str | None:
    """What pip keeps of where it installed hysparse from (PEP 610)."""
    try:
        return distribution("hysparse").read_text("direct_url.json")
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if not done.returncode else None
