"""Runs in one subject's process: waits for a turn, measures one cell, and frees what it took."""

import gc
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.ceilings import measured_ceilings
from hysparse_cli.bench.decode import decode
from hysparse_cli.bench.exactness import AttentionCheck, wrong
from hysparse_cli.bench.failures import FAILURES, OUT_OF_MEMORY, reason_of
from hysparse_cli.bench.lists import local_lists, read_lists
from hysparse_cli.bench.memory import confirm, measure_memory
from hysparse_cli.bench.prefill import measure_prefill
from hysparse_cli.bench.subjects import Subject
from hysparse_cli.bench.train import measure_train
from hysparse_cli.bench.weights import Weights, config_of, torch_dtype
from hysparse_cli.bench.work import ModelSizes, work_of
from hysparse_cli.devices import free_memory
from hysparse_cli.errors import HysparseError, OutOfResources
from hysparse_cli.model.attention import DENSE_NAME
from hysparse_cli.model.kv_cache import kv_cache_of
from hysparse_cli.model.loading import resolve_device
from hysparse_cli.recipe import BenchOptions
from hysparse_cli.recipe.bench import Phase
from hysparse_kernels.backends import Call, choose

OPS = ("full_attention", "sparse_layer_attention", "sliding_window_attention")
QUICK_SECONDS = 20  # what takes longer than that is slowed by less than 1%


@dataclass(frozen=True)
class Cell:
    """One thing to measure of every subject."""

    phase: Phase
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.phase} {self.context:,} x {self.batch:,}"


@dataclass(frozen=True)
class Failed:
    """Why there is no measurement. ended: the process has gone, and the next turn needs another."""

    reason: str
    ended: bool = False


def serve(connection: Connection, subject: Subject, options: BenchOptions) -> None:
    """Answer with what each cell gave, a dict or Failed, until the other side hangs up.

    The process ends at once where the one that asks has gone, whatever is being measured.
    A HysparseError is sent as it is. After a failure that was no lack of memory the process ends:
    a GPU may be left in any state.
    """
    Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    gc.freeze()  # what is imported stays, and need not be searched between turns
    ready = ReadySubject(subject, options)
    with suppress(EOFError, ConnectionError):
        while True:
            answer = ready.answer(connection.recv())
            if isinstance(answer, Failed) and answer.ended:
                connection.send(answer)
                return
            ready.free()  # before the next subject has its turn
            connection.send(answer)


class ReadySubject:
    """One subject, as its process measures it."""

    def __init__(self, subject: Subject, options: BenchOptions):
        self.subject, self.options = subject, options
        self.device = resolve_device(options.device)
        self.part = AttentionPart(subject.backend)
        self._weights: Weights | None = None

    def answer(self, asked: Cell | str) -> Any:
        """What ``asked`` gave: a cell, "about" the subject, or the device's "ceilings"."""
        try:
            if asked == "about":
                return self.about()
            if asked == "ceilings":
                dtype = torch_dtype(self.subject, self.options.dtype)
                return measured_ceilings(dtype, self.device, self.options.seed)
            assert isinstance(asked, Cell)
            return self.measure(asked)
        except OutOfResources:
            return Failed(OUT_OF_MEMORY)
        except HysparseError as error:
            return error
        except FAILURES as error:
            reason = reason_of(error)
            return Failed(reason, ended=reason != OUT_OF_MEMORY)

    def about(self) -> dict[str, Any]:
        """What the subject is, for people who read its numbers."""
        subject, model = self.subject, self._unallocated()
        spec = subject.spec
        return {
            "subject": subject.name,
            "attention": f"{spec.layout} {spec.pattern}" if spec else f"dense, {subject.backend}",
            "weights": subject.checkpoint or "random",
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernels": {} if subject.is_dense else self._kernels(model),
        }

    def measure(self, cell: Cell) -> dict[str, Any] | Failed:
        """The numbers of one turn; Failed where the attention was wrong."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if cell.phase == "memory":
            found = self._memory(cell)
        else:
            found = self._timed(cell)
            whole, attention = work_of(self._sizes, cell.phase, cell.context, cell.batch)
            found |= {"work": whole, "attention_work": attention}
        if self.device.type == "cuda":
            found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if self.part.check is not None:  # after the peak, of which it is no part
            found |= self.part.check.errors()
            if reason := wrong(found, torch_dtype(self.subject, self.options.dtype)):
                return Failed(reason)
        return found

    def _timed(self, cell: Cell) -> dict[str, Any]:
        model, options = self._model(), self.options
        context, batch, seed = cell.context, cell.batch, options.seed
        self.part.lists, self.part.check = self._lists(cell), AttentionCheck()
        measured = (model, self.part, context, batch, seed)
        if cell.phase == "prefill":
            counted = batch * kv_cache_of(model.config).total_bytes(context, model.dtype.itemsize)
            found = self._settled(partial(measure_prefill, *measured))
            return found | {"arithmetic_kv_bytes": counted}
        if cell.phase == "decode":
            steps = options.decode_tokens
            return decode(model, self.part, context, batch, steps=steps, seed=seed)
        checkpointing = options.gradient_checkpointing
        return self._settled(partial(measure_train, *measured, checkpointing=checkpointing))

    def _settled(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` gives; on a GPU, if that was quick, what it gives once more: at first it
        asks the driver for memory, which ``free`` gave back."""
        begin = time.perf_counter()
        found = measure()
        if self.device.type == "cuda" and time.perf_counter() - begin < QUICK_SECONDS:
            found = measure()
        return found

    def _lists(self, cell: Cell) -> Tensor | None:
        """What sparse layers are to attend to where it is not what the model selects: only where
        many queries might share blocks."""
        options, spec = self.options, self.subject.spec
        if options.lists == "own" or cell.phase == "decode" or spec is None or not spec.selects:
            return None
        kv_heads = kv_cache_of(config_of(self.subject)).num_kv_heads
        sizes = (cell.context, kv_heads, spec.top_k_blocks, spec.block_size)
        if options.lists == "local":
            return local_lists(*sizes, torch.Generator(self.device).manual_seed(options.seed))
        return read_lists(Path(options.lists), *sizes).to(self.device)

    def _memory(self, cell: Cell) -> dict[str, Any]:
        config, weight_bytes = config_of(self.subject), self._sizes.weight_bytes
        dtype = torch_dtype(self.subject, self.options.dtype)
        found = measure_memory(config, weight_bytes, cell.context, dtype, self.device)
        if self.device.type == "cuda":
            largest = found["largest_batch"]
            largest = confirm(self._model(), cell.context, largest, self.options.seed)
            found |= {"largest_batch": largest, "largest_batch_is": "confirmed"}
        return found

    def _model(self) -> Any:
        """The subject's model, on the device."""
        if self._weights is None:
            options = self.options
            self._weights = Weights(
                self.subject,
                options.dtype,
                self.device,
                options.seed,
                trust_remote_code=options.trust_remote_code,
            )
            self.part.attach(self._weights.model)
        self._weights.restore()
        return self._weights.model

    @cached_property
    def _sizes(self) -> ModelSizes:
        return ModelSizes(self._unallocated())

    def _unallocated(self) -> Any:
        auto: Any = AutoModelForCausalLM
        attention = {"attn_implementation": DENSE_NAME} if self.subject.is_dense else {}
        dtype = torch_dtype(self.subject, self.options.dtype)
        with torch.device("meta"):
            return auto.from_config(
                config_of(self.subject), dtype=dtype, trust_remote_code=False, **attention
            )

    def _kernels(self, model: Any) -> dict[str, str]:
        """The backend chosen for each op."""
        heads, spec = kv_cache_of(model.config), self.subject.spec
        assert spec is not None
        like: dict[str, Any] = {"device": self.device, "dtype": model.dtype}
        q = torch.empty(1, 1, model.config.num_attention_heads, heads.head_dim, **like)
        k = torch.empty(1, 1, heads.num_kv_heads, heads.head_dim, **like)
        return {op: str(choose(Call(op, q, k, k, spec.block_size))) for op in OPS}

    def free(self) -> None:
        """Leave the device's memory to others."""
        if self._weights is not None:
            self._weights.park()
        part = self.part
        part.marks = part.calls = part.check = part.lists = None
        free_memory(self.device)


def _end_with_parent() -> None:
    """Wait for the process that started this one, and end with it: a killed one can't say so, and
    a turn may take hours."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
