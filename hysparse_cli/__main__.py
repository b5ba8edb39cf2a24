"""``python -m hysparse_cli``: what torchrun and other launchers start in each process."""

from hysparse_cli.cli import main

main()
