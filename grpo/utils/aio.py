"""Helpers that asyncio lacks: structured waits for several tasks, a change, a time-out or a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

R = TypeVar("R")


class Interrupted(Exception):
    """The shutdown event was set before the work was done."""


class Signal:
    """Wake every task that waits for a change; the change itself is made outside of any lock.

    Example:
        pacer.released += 1
        changed.notify()
        ...
        await changed.wait_for(lambda: pacer.released > 3)     # in another task
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        await self._changed.wait()

    async def wait_for(self, condition: Callable[[], R]) -> R:
        """Return the value of `condition()` once it is true; it is evaluated now and after every `notify`."""
        while not (value := condition()):
            await self.wait()
        return value


async def gather_or_cancel(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Return the results in order. The first error cancels the other tasks, waits for them to end, and is raised.

    Not an asyncio.TaskGroup, in which an error hides a cancellation of the caller that arrives at the same moment.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        return [task.result() for task in tasks]
    finally:
        await cancel_and_wait(tasks)


async def run_until_set(shutdown: asyncio.Event, work: Coroutine[Any, Any, R]) -> R:
    """Await `work`, or cancel it and raise Interrupted once `shutdown` is set. Errors of `work` take precedence."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(shutdown.wait())
    try:
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        if task.done() and (error := task.exception()):
            raise error
        if shutdown.is_set():
            raise Interrupted
        return task.result()
    finally:
        await cancel_and_wait((task, stop))


async def race(work: Coroutine[Any, Any, R], *watches: Coroutine[Any, Any, NoReturn]) -> R:
    """Await `work`, or cancel it and raise the first error of a watch."""
    task, watching = asyncio.ensure_future(work), [asyncio.ensure_future(watch) for watch in watches]
    try:
        await asyncio.wait((task, *watching), return_when=asyncio.FIRST_COMPLETED)
        return next(each for each in (task, *watching) if each.done()).result()
    finally:
        await cancel_and_wait((task, *watching))


@asynccontextmanager
async def timeout_as(seconds: float | None, make_error: Callable[[], Exception]) -> AsyncIterator[None]:
    """Raise `make_error()` when the block takes longer than `seconds`; None never does.

    A TimeoutError of the block itself passes through.
    """
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise make_error() from error


def being_cancelled() -> bool:
    """Return True if the current task is cancelled; False if a CancelledError comes from what it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def task_name() -> str:
    """Return the name of the current task, or "" outside of any."""
    task = asyncio.current_task()
    return "" if task is None else task.get_name()


async def cancel_and_wait(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended; exceptions are discarded."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def raise_first(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the first error of a failed task group. The other errors, mostly its consequences, become notes."""
    first, *others = _leaves(group)
    for other in others:
        if other is not first:  # the same error may have reached several tasks
            first.add_note(f"at the same time: {type(other).__name__}: {other}")
    raise first from first.__cause__  # the cause holds the traceback of another process


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
