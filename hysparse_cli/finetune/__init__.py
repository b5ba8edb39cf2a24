"""``hysparse finetune``: next-token training and distillation of a checkpoint."""

from hysparse_cli.finetune.run import finetune

__all__ = ["finetune"]
