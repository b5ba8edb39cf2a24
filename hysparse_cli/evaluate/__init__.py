"""Evaluates checkpoints: loss on text, and retrieval from contexts that it writes itself."""

from hysparse_cli.evaluate.run import evaluate
from hysparse_cli.evaluate.table import tables

__all__ = ["evaluate", "tables"]
