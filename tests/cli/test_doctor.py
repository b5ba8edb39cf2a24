"""hysparse doctor: what is installed, what would run each op, and what to install."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from hysparse_cli import doctor
from hysparse_kernels.backends import BACKENDS
from tests.conftest import Hysparse


@pytest.fixture(autouse=True)
def no_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYSPARSE_BACKEND", raising=False)


def test_everything_is_in_the_json(hysparse: Hysparse) -> None:
    run = hysparse("doctor", "--json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["schema"] == "hysparse.doctor/1"
    assert list(found["versions"]) == ["python", "hysparse", "torch", "triton", "transformers"]
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["gpus"]) >= 1 and len(found["backends"]) == 4
    names = {backend.name for backend in BACKENDS}
    for row in found["backends"]:
        assert row["backend"] in names and row["backend"] not in row["refusals"]
    packages = {row["name"] for row in found["optional"]}
    assert {"peft", "datasets", "lm_eval", "tensorboard", "wandb"} <= packages


def test_what_is_missing_is_said_with_how_to_install_it_in_80_columns(
    hysparse: Hysparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setenv("COLUMNS", "80")
    run = hysparse("doctor")
    assert run.exit_code == 0 and max(map(len, run.stdout.splitlines())) <= 80
    for extra in ("lora", "data", "lm-eval", "logging"):
        assert f"pip install 'hysparse[{extra}]'" in run.stdout
    assert "missing" in run.stdout


def test_each_extra_is_one_of_the_package() -> None:
    from importlib.metadata import metadata

    assert {extra for _, extra, _ in doctor.OPTIONAL} <= set(
        metadata("hysparse").get_all("Provides-Extra")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels")
def test_without_a_gpu_every_other_backend_says_why_it_does_not_run() -> None:
    others = {backend.name for backend in BACKENDS} - {"reference"}
    for row in doctor.examine().backends:
        assert row.backend == "reference" and others == {
            n for n, why in row.refusals.items() if why
        }


def test_a_backend_that_the_environment_asks_for_is_named(
    hysparse: Hysparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYSPARSE_BACKEND", "nonsense")
    run = hysparse("doctor")
    assert run.exit_code == 0 and "nothing" in run.stdout and "HYSPARSE_BACKEND" in run.stdout
