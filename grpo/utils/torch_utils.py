"""Devices, compiled functions and compute threads: how a model computes beside an event loop."""

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

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


def device_for(num_gpus: float) -> str:
    """Return the device of an actor with this many GPUs, or a fraction of one. Ray shows it only its own GPUs."""
    return "cuda" if num_gpus > 0 else "cpu"


def gpus_here() -> int:
    """Return the number of GPUs that this process can use."""
    return torch.cuda.device_count()


def check_device(device: str, dtype: str) -> None:
    """Raise ConfigError if torch does not find `device` (cpu or cuda), or if the device can't compute in `dtype`."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        reason = "it is built without CUDA" if torch.version.cuda is None else "the driver is missing or too old"
        raise ConfigError(
            f"Ray gave this actor a GPU, but torch {torch.__version__} can't use it: {reason}. Install a torch build "
            "for this GPU on every node, or set it to 0.",
            key="num_gpus",
        )
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{torch.cuda.get_device_name()} can't compute in bfloat16 (Ampere and later can). Use float32.",
            key="model.dtype",
        )


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of tensors: compiled into one kernel if its first argument is a tensor on a GPU.

    If compilation fails, for example without a C compiler, a warning is logged once and the function runs uncompiled.
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
            except Exception as error:  # a compiler may raise anything; it does so before the function has run
                log.warning("%s is not compiled: %s: %s", function.__name__, type(error).__name__, error)
                compiled = function
        return compiled(*args, **kwargs)

    return call


class ComputeThread:
    """One thread that runs work in order, off the event loop, so that an actor answers while its model computes.

    `busy_s` is the total time of the work. `torch_threads` is the number of cores that torch may use inside; 0 leaves
    torch's default.

    Example:
        thread = ComputeThread("trainer", torch_threads=4)
        metrics = await thread.run(learner.train_step, batch)
        thread.close()
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
        """Wait for work in progress and end the thread."""
        self._executor.shutdown()


async def run_in_temp_thread(torch_threads: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `work` in a thread that ends afterwards, together with the pool that OpenMP created for its loops.

    An idle pool that stays makes every other pool of the process yield its cores between two loops: with more threads
    than cores, OpenMP stops busy-waiting. Small models then decode at half the speed.
    """
    thread = ComputeThread("temporary", torch_threads)
    try:
        return await thread.run(work, *args, **kwargs)
    finally:
        thread.close()


class BusyClock:
    """Seconds during which at least one `busy()` block was open."""

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
