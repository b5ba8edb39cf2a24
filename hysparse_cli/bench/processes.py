"""Runs each subject in a process of its own, and asks them in turns."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from typing import Any

import psutil

from hysparse_cli.bench.subjects import Subject
from hysparse_cli.bench.worker import Cell, Failed, serve
from hysparse_cli.errors import HysparseError
from hysparse_cli.model.loading import resolve_device
from hysparse_cli.recipe import BenchOptions

LEAVE_SECONDS = 5


class Worker:
    """A subject's process, started when it is first asked, and again after it was lost.

    Closing it, or leaving its ``with`` block, ends the process.
    """

    def __init__(self, subject: Subject, options: BenchOptions):
        self.subject, self.options = subject, options
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process, which then gets ready by itself."""
        if self._process is not None:
            return
        # On a CPU one process imports torch once and forks the workers. CUDA outlives no fork, and
        # a library that is imported may have asked it something.
        on_cpu = resolve_device(self.options.device).type == "cpu"
        context: Any = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self.subject, self.options)
        process = context.Process(target=serve, args=arguments, daemon=True)
        if on_cpu:
            context.set_forkserver_preload(["hysparse_cli.bench.worker"])
            with _unheard():
                forkserver.ensure_running()
            process.start()  # waits for the imports, and may be interrupted meanwhile
        else:
            with _unheard():
                process.start()
        self._process = process
        theirs.close()

    @property
    def process_id(self) -> int:
        """Of the process as it is; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    def ask(self, what: Cell | str) -> Any:
        """The process's answer: what was measured, or Failed, also where the process died.

        Raises: HysparseError where the subject can't be measured at all.
        """
        self.start()
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            return Failed(self._cause_of_death())
        if isinstance(answer, HysparseError):
            raise answer
        if isinstance(answer, Failed) and answer.ended:
            self.close()
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is None:
            return
        self._process.join(LEAVE_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _cause_of_death(self) -> str:
        process = self._process
        process.join()
        code = process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"crashed: {signal.Signals(-code).name}"
        return f"crashed: exit code {code}"


@contextmanager
def interruptible() -> Iterator[None]:
    """Let an interrupt end every process that was started in the block: one that was just being
    started is known to nobody else."""
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    except KeyboardInterrupt:
        for process in psutil.Process().children(recursive=True):
            if process not in before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        raise


@contextmanager
def _unheard() -> Iterator[None]:
    """Let processes that are started here never hear Ctrl-C, which a terminal sends to all: they
    would say so while they import; this process sees to them."""
    resource_tracker.ensure_running()  # first, since it unblocks the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
