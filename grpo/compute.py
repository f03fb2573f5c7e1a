"""Heavy arithmetic off the event loop: one thread per model, so an actor answers while it computes. And its clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


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


async def run_apart(torch_threads: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
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
