"""Starts the processes of a run on one machine, with torch's own elastic launcher."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hysparse_cli.errors import HysparseError, Interrupted, OutOfResources
from hysparse_cli.finetune.data import rows_of_step
from hysparse_cli.finetune.state import kept_of
from hysparse_cli.processes import claimed_exit_code, running
from hysparse_cli.recipe import FinetuneOptions

PATIENCE_SECONDS = 30  # with a process that was told to end


def launch(arguments: Sequence[str], out: Path, options: FinetuneOptions) -> int:
    """Run ``hysparse`` with ``arguments``, which say the others; returns the exit code.

    A process that fails says why itself; where it can't, since it was killed, that is raised here.

    Raises: OutOfResources where a process was killed; Interrupted on an interrupt; InvalidRecipe
        where so many processes can't share the rows of a step.
    """
    num_processes = options.nproc_per_node or 1
    rows_of_step(options, num_processes)
    logging.disable(logging.CRITICAL)  # the launcher's own, of processes that it has to end
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="hysparse-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id="hysparse",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)(*running("hysparse_cli"), *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            was_killed = failure.exitcode < 0
            return _exit_code(Path(folder), _killed(rank, failure), told_to_end=was_killed)
        except SignalException as stop:
            _end_children()
            return _exit_code(Path(folder), _interrupted(out, stop))
    return 0


def _end_children() -> None:
    """End what the launcher had started, but not yet taken note of, when it was interrupted."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=PATIENCE_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _interrupted(out: Path, stop: SignalException) -> Interrupted:
    error = Interrupted(kept_of(out) or "interrupted; nothing half written is left")
    error.exit_code = 128 + int(stop.sigval)
    return error


def _exit_code(folder: Path, otherwise: HysparseError, *, told_to_end: bool = False) -> int:
    """What the first process to fail has said; where none did, ``otherwise`` is raised.

    Args:
        told_to_end: whether the launcher ended the others, which then say that of themselves.
    """
    code = claimed_exit_code(folder)
    if code is None or (told_to_end and code == 128 + signal.SIGTERM):
        raise otherwise from None
    return code


def _killed(rank: int, failure: ProcessFailure) -> HysparseError:
    name = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return OutOfResources(
        f"process {rank} of the run was ended from outside ({name}), often for want of host memory;"
        " where state was saved, --resume auto goes on from it"
    )
