"""Calls of user code from an event loop: `async def` is awaited, `def` runs in a thread."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any


class UserCalls:
    """Threads for user code that is not async. A thread that hangs is lost, since Python can't end it.

    Example:
        calls = UserCalls(threads=32)
        reply = await calls.run(environment.reply, message)   # a plain method or an async one
        calls.close()
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="environment")
        self._abandoned: dict[Future[Any], float] = {}  # since when nobody waits for them

    def hanging(self, seconds: float) -> int:
        """Return the number of calls that were cancelled more than `seconds` ago and have not returned."""
        return sum(time.monotonic() - since > seconds for since in list(self._abandoned.values()))

    async def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns. Cancelling leaves a plain function's thread behind until it returns."""
        if inspect.iscoroutinefunction(function):
            return await function(*args, **kwargs)
        call = self._threads.submit(copy_context().run, partial(function, *args, **kwargs))
        try:
            result = await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            if call.running():
                self._abandoned[call] = time.monotonic()
                call.add_done_callback(lambda call: self._abandoned.pop(call, None))
            raise
        return await result if inspect.isawaitable(result) else result

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
