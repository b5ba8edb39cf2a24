"""Inspects what full layers select, and how well that serves the sparse layers."""

from hysparse_cli.inspect_topk.files import check_files, write_files
from hysparse_cli.inspect_topk.run import inspect_topk
from hysparse_cli.inspect_topk.table import as_table

__all__ = ["as_table", "check_files", "inspect_topk", "write_files"]
