"""Runs ``hysparse doctor``."""

from hysparse_cli.cli.shared import AsJson, show


def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, and which kernels would run."""
    from hysparse_cli.doctor import examine

    show(examine(), as_json)
