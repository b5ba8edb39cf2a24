"""What can go wrong through no fault of ours, each kind with its exit code.

Raise one of these for bad input; the CLI prints its one line and exits with ``exit_code``. Anything
else that escapes is a bug: exit code 1. The message says what was wrong (with the value), where
(file, tensor, recipe field), and what to do.
"""


class HysparseError(Exception):
    """A user-facing error; the message is one line and complete."""

    exit_code = 1


class InvalidRecipe(HysparseError):
    """A recipe, option or plan that cannot be carried out."""

    exit_code = 3


class UnsupportedModel(HysparseError):
    """A model that HySparse cannot be retrofitted into, or not yet."""

    exit_code = 4


class OutOfResources(HysparseError):
    """Not enough memory, disk or GPU."""

    exit_code = 5


class QualityGateFailed(HysparseError):
    """A measured quality is below what was required."""

    exit_code = 6


class UnreadableInput(HysparseError):
    """An input that is missing, corrupt or not what it claims to be."""

    exit_code = 7


class Interrupted(HysparseError):
    """The user stopped the command, and there is more to say than that."""

    exit_code = 130
