"""``hysparse eval``: loss on text, and retrieval from contexts that it writes itself."""

from hysparse_cli.evaluate.run import evaluate

__all__ = ["evaluate"]
