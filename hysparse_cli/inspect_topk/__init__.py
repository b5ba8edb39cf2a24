"""``hysparse inspect-topk``: what full layers select, and how that fits the layers they serve."""

from hysparse_cli.inspect_topk.run import inspect_topk

__all__ = ["inspect_topk"]
