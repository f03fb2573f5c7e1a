"""What asyncio lacks: waiting for several or for a change, racing a shutdown, the one error of a task group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

R = TypeVar("R")


class Interrupted(Exception):
    """The shutdown came first."""


class Signal:
    """Wakes everybody who waits for a change that was made outside of any lock."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        """Until the next `notify`."""
        await self._changed.wait()

    async def wait_for(self, condition: Callable[[], R]) -> R:
        """Return what `condition()` gives as soon as that is true; it is asked again at every `notify`."""
        while not (value := condition()):
            await self.wait()
        return value


async def gather_or_cancel(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Results in order. The first error cancels the others, waits for them to end, and is raised as it is.

    Not an asyncio.TaskGroup: there an error hides a cancellation of the caller that comes at the same moment.
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
    """Await `work`, or cancel it and raise Interrupted as soon as `shutdown` is set; errors of `work` come first."""
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
    """Await `work`, or cancel it and raise what a watch raises first."""
    task, watching = asyncio.ensure_future(work), [asyncio.ensure_future(watch) for watch in watches]
    try:
        await asyncio.wait((task, *watching), return_when=asyncio.FIRST_COMPLETED)
        return next(each for each in (task, *watching) if each.done()).result()
    finally:
        await cancel_and_wait((task, *watching))


@asynccontextmanager
async def timeout_as(seconds: float | None, late: Callable[[], Exception]) -> AsyncIterator[None]:
    """Raise what `late()` makes when the block takes longer; time-outs of its own pass through. None is for ever."""
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise late() from error


def task_name() -> str:
    """Of the present task."""
    task = asyncio.current_task()
    return "" if task is None else task.get_name()


async def cancel_and_wait(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is nobody's business any more."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def raise_first(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """The first error of a failed task group; the others are mostly its consequences, and are kept as notes."""
    first, *others = _leaves(group)
    for other in others:
        if other is not first:  # one that reached several tasks
            first.add_note(f"at the same time: {type(other).__name__}: {other}")
    raise first from first.__cause__  # an error from another process has its traceback there


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
