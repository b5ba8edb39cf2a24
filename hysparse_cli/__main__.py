"""Runs the command line under ``python -m hysparse_cli``, as torchrun and other launchers do."""

from hysparse_cli.cli import main

main()
