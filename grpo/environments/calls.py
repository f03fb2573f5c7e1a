"""Calls of user code from an event loop: `async def` is awaited, `def` runs in a thread."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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
        self._free = asyncio.Semaphore(threads)
        self._abandoned: dict[Future[Any], float] = {}  # since when nobody waits for them

    def hanging(self, seconds: float) -> int:
        """Return the number of calls that were cancelled more than `seconds` ago and have not returned."""
        return sum(time.monotonic() - since > seconds for since in list(self._abandoned.values()))

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns. Cancelling leaves a plain function's thread behind until it returns."""
        return await (await self.start(function, *args, **kwargs))

    async def start(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Wait for a free thread if the function needs one; return the call, to be awaited at once."""
        call = partial(function, *args, **kwargs)
        if inspect.iscoroutinefunction(function):
            return _await(call)
        await self._free.acquire()
        return self._run_in_thread(call)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run_in_thread(self, function: Callable[[], Any]) -> Any:
        """Call the function in a free thread, which is free again when it returns."""
        loop = asyncio.get_running_loop()

        def free(call: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop was closed while the thread hung
                loop.call_soon_threadsafe(self._free.release)

        call = self._threads.submit(copy_context().run, _in_thread, function)
        call.add_done_callback(free)
        try:
            result = await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            if call.running():
                self._abandoned[call] = time.monotonic()
                call.add_done_callback(lambda call: self._abandoned.pop(call, None))
            raise
        return await result if inspect.isawaitable(result) else result


async def _await(function: Callable[[], Awaitable[Any]]) -> Any:
    return await function()


def _in_thread(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StopIteration as error:  # no future can hold one: whoever awaits it would wait for ever
        raise RuntimeError("StopIteration") from error
