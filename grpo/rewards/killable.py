"""Code that may hang or crash, in processes that can be killed. Needs pebble."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as TimedOut
from concurrent.futures.process import BrokenProcessPool
from threading import Lock
from typing import Any, Generic, TypeVar

from pebble import ProcessExpired, ProcessPool

from grpo.types import RewardError, RewardTimeout

_GRACE_S = 2.0  # by which a worker outlives its time-out when this process was killed

T = TypeVar("T")


class Killable(Generic[T]):
    """Calls a function of a module in one of `workers` processes, each call for at most `timeout_s` seconds.

    The processes start at the first call and serve all threads; one that hangs is killed and replaced. They end with
    `close`, with this process, and also when this process is killed.
    """

    def __init__(self, function: Callable[..., T], timeout_s: float, workers: int = 2) -> None:
        self._function, self._timeout_s, self._workers = function, timeout_s, workers
        self._pool: ProcessPool | None = None
        self._starting = Lock()

    def map(self, calls: Iterable[tuple[Any, ...]]) -> list[T]:
        """The results for several tuples of arguments, in their order. Time spent waiting for a process is free.

        Raises RewardTimeout when a call times out, RewardError when its process dies, and what the function itself
        raises.
        """
        pool = self._running_pool()
        args = (self._function, self._timeout_s)
        futures = [pool.schedule(_call, args=(*args, call), timeout=self._timeout_s) for call in calls]
        try:
            return [future.result() for future in futures]
        except TimedOut as error:
            raise RewardTimeout(f"timeout: took longer than {self._timeout_s:g} s and was killed") from error
        except ProcessExpired as error:
            raise RewardError(f"its process died with exit code {error.exitcode}") from error
        except BrokenProcessPool as error:
            raise RewardError(f"its processes are gone: {error}") from error
        finally:
            for future in futures:
                future.cancel()  # those behind the one that failed

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        with self._starting:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None

    def _running_pool(self) -> ProcessPool:
        with self._starting:
            if self._pool is None or not self._pool.active:  # it breaks when an idle process is killed from outside
                self._pool = ProcessPool(
                    self._workers,
                    initializer=importlib.import_module,  # ahead of the first call, so that it counts in none
                    initargs=(self._function.__module__,),
                    context=multiprocessing.get_context("spawn"),
                )
            return self._pool


def _call(function: Callable[..., T], timeout_s: float, args: tuple[Any, ...]) -> T:
    """Runs in the worker. The alarm ends it when nobody is left to kill it, also where a call never frees the GIL."""
    faulthandler.dump_traceback_later(timeout_s + _GRACE_S, exit=True)
    try:
        return function(*args)
    finally:
        faulthandler.cancel_dump_traceback_later()
