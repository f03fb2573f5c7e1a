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
from typing import Any, NamedTuple

from grpo.utils.aio import Signal


class _Abandoned(NamedTuple):
    """A call for which nobody waits any more, since a time, and the object whose method it is."""

    since: float
    owner: object


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
        self._abandoned: dict[Future[Any], _Abandoned] = {}
        self._changed = Signal()

    def hanging(self, seconds: float) -> int:
        """Return the number of calls that were cancelled more than `seconds` ago and have not returned."""
        return sum(time.monotonic() - call.since > seconds for call in self._abandoned.values())

    async def returned(self, owner: object) -> None:
        """Wait until every cancelled call of a method of `owner` has returned."""
        await self._changed.wait_for(lambda: all(call.owner is not owner for call in self._abandoned.values()))

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns. Cancelling leaves a plain function's thread behind until it returns."""
        result = await (await self.start(function, *args, **kwargs))
        return await result if inspect.isawaitable(result) else result

    async def start(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Wait for a free thread if the function needs one; return the call, to be awaited at once.

        It gives what the function returns, which may have to be awaited in turn: here, and no longer in a thread.
        """
        call = partial(function, *args, **kwargs)
        if inspect.iscoroutinefunction(function):
            return _call(call)
        await self._free.acquire()
        return self._run_in_thread(call, getattr(function, "__self__", None))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run_in_thread(self, function: Callable[[], Any], owner: object) -> Any:
        """Call the function in a free thread, which is free again when it returns."""
        loop = asyncio.get_running_loop()

        def tell(call: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop was closed while the thread hung
                loop.call_soon_threadsafe(self._has_returned, call)

        call = self._threads.submit(copy_context().run, _in_thread, function)
        call.add_done_callback(tell)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            if call.running():
                self._abandoned[call] = _Abandoned(time.monotonic(), owner)
            raise

    def _has_returned(self, call: Future[Any]) -> None:
        self._free.release()
        if self._abandoned.pop(call, None):
            self._changed.notify()


async def _call(function: Callable[[], Any]) -> Any:
    return function()


def _in_thread(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StopIteration as error:  # no future can hold one: whoever awaits it would wait for ever
        raise RuntimeError("StopIteration") from error
