"""Where a model computes: the one place that chooses a device, and says what it can't do."""

# MERGED: Many small operations on a GPU as one kernel, where torch can compile them.
# MERGED: Heavy arithmetic off the event loop: one thread per model, so an actor answers while it computes.
# And its clock.

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from grpo.errors import ConfigError


def device_for(num_gpus: float) -> str:
    """Of an actor that asks for so many GPUs, or for a share of one. Ray shows it those that it got, as the first."""
    return "cuda" if num_gpus > 0 else "cpu"


def gpus_here() -> int:
    """How many this process can compute on."""
    return torch.cuda.device_count()


def check_device(device: str, dtype: str) -> None:
    """Raise ConfigError where `device` (cpu or cuda) is not there for torch, or does not compute in `dtype`."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        reason = "it is built without CUDA" if torch.version.cuda is None else "the driver is missing or too old"
        raise ConfigError(
            f"Ray gave this actor a GPU, but torch {torch.__version__} has none: {reason}; install a torch for this "
            "GPU on every node, or set it to 0",
            key="num_gpus",
        )
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16 (those since Ampere do); take float32",
            key="model.dtype",
        )


P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose first argument is a tensor, compiled for tensors on a GPU and itself for all others.

    Where compiling fails, for want of a C compiler say, it goes on as it is, and says so once.
    """
    compiled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        tensor = args[0]
        if not (isinstance(tensor, torch.Tensor) and tensor.is_cuda):
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:  # whatever a compiler may raise; it raises before anything has run
                log.warning("%s is not compiled: %s: %s", function.__name__, type(error).__name__, error)
                compiled = function
        return compiled(*args, **kwargs)

    return call


class ComputeThread:
    """Runs one piece of work at a time, in order, and adds up how long it was busy.

    `torch_threads` is how many cores torch may use inside; 0 leaves torch's own choice.
    """

    def __init__(self, name: str, torch_threads: int = 0) -> None:
        self.busy_s = 0.0
        setup = (lambda: torch.set_num_threads(torch_threads)) if torch_threads > 0 else (lambda: None)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=setup)

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        def timed() -> R:
            started = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.busy_s += time.perf_counter() - started

        return await asyncio.get_running_loop().run_in_executor(self._executor, copy_context().run, timed)

    def close(self) -> None:
        """Wait for the work at hand and end the thread."""
        self._executor.shutdown()


async def run_in_temp_thread(torch_threads: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `work` in a thread that ends with it, and with the thread the pool that OpenMP made for its loops.

    A pool that stays, idle, makes every other one in the process give up its cores between two loops: with more
    threads than cores OpenMP no longer waits awake. Small models then decode at half the speed.
    """
    thread = ComputeThread("apart", torch_threads)
    try:
        return await thread.run(work, *args, **kwargs)
    finally:
        thread.close()


class BusyClock:
    """Adds up the seconds during which at least one piece of work was under way."""

    def __init__(self) -> None:
        self._done_s, self._running, self._since = 0.0, 0, 0.0

    @property
    def seconds(self) -> float:
        return self._done_s + (time.perf_counter() - self._since if self._running else 0.0)

    @contextmanager
    def busy(self) -> Iterator[None]:
        if not self._running:
            self._since = time.perf_counter()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._done_s += time.perf_counter() - self._since
