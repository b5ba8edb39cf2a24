"""Runs ``hysparse doctor``."""

from hysparse_cli.cli.shared import AsJson, show


def doctor(as_json: AsJson = False) -> None:
    """Show versions, GPUs, attention backends and optional packages."""
    from hysparse_cli.doctor import examine

    show(examine(), as_json)
