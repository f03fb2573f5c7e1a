"""Send concurrent calls of one method of one process together: a call costs Ray a millisecond, whatever is in it.

The first call is sent at once. The calls that are made while it is under way wait for it, and are sent as one batch. So
the busier the caller, the larger the batches. A slow call does not delay the others: after a moment the batch returns
without its answer. One more call, for all that is still out, then waits for the next answers to be there, as long as
there are any.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from grpo.errors import PayloadLost

_BATCH_TIMEOUT_S = 0.005
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_call_numbers = count()


class Answers(NamedTuple):
    """Answers by call number; the numbers of calls that raised, and of calls that are not done."""

    done: dict[int, Any]
    failed: tuple[int, ...] = ()
    late: tuple[int, ...] = ()


class Wire(NamedTuple):
    """The three ways in which a caller reaches the process; see BatchRunner."""

    run: Callable[[str, Mapping[int, Arguments]], Awaitable[Answers]]
    late_answers: Callable[[str], Awaitable[Answers]]
    error: Callable[[str, int], Awaitable[Any]]


class CallBatcher:
    """The caller's side of one method."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._name = wire, uuid.uuid4().hex
        self._waiting: dict[int, Arguments] = {}
        self._results: dict[int, asyncio.Future[Any]] = {}  # of all calls that have no answer
        self._sending: asyncio.Task[None] | None = None
        self._polling: asyncio.Task[None] | None = None
        self._late = 0
        self._errors: set[asyncio.Task[None]] = set()

    async def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the answer. Raises what the method raises, and what the wire raises."""
        number = next(_call_numbers)
        self._waiting[number] = (args, kwargs)
        self._results[number] = asyncio.get_running_loop().create_future()
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_waiting())
        try:
            return await self._results[number]
        finally:
            self._results.pop(number, None)

    async def _send_waiting(self) -> None:
        while self._waiting:
            calls, self._waiting = self._waiting, {}
            await self._send_batch(calls)
        self._sending = None

    async def _send_batch(self, calls: Mapping[int, Arguments]) -> None:
        try:
            answers = await self._wire.run(self._name, calls)
        except Exception as error:
            if isinstance(error, PayloadLost) and len(calls) > 1:  # of one call; none of the batch has started
                await asyncio.gather(*(self._send_batch({number: call}) for number, call in calls.items()))
                return
            self._fail(calls, error)
        else:
            self._late += len(answers.late)
            self._settle(answers)
            if self._late and self._polling is None:
                self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        """Wait for answers that were late, until none is."""
        while self._late:
            try:
                answers = await self._wire.late_answers(self._name)
            except Exception as error:  # of the whole process: no call that is late will be answered
                sent = self._results.keys() - self._waiting.keys()
                self._late = 0
                self._fail(sent, error)
                break
            self._late -= len(answers.done) + len(answers.failed)
            self._settle(answers)
        self._polling = None

    def _settle(self, answers: Answers) -> None:
        for number, answer in answers.done.items():
            if number in self._results and not self._results[number].done():  # else its caller was cancelled
                self._results[number].set_result(answer)
        for number in answers.failed:
            task = asyncio.create_task(self._raise_for(number))
            self._errors.add(task)
            task.add_done_callback(self._errors.discard)

    async def _raise_for(self, number: int) -> None:
        """Fetch the error of one call by a call of its own, so that it arrives with its type and traceback."""
        try:
            await self._wire.error(self._name, number)
        except Exception as error:
            self._fail([number], error)

    def _fail(self, numbers: Any, error: Exception) -> None:
        for number in list(numbers):
            if number in self._results and not self._results[number].done():
                self._results[number].set_exception(error)


class BatchRunner:
    """The process's side, for any number of callers."""

    def __init__(self) -> None:
        self._callers: defaultdict[str, _Calls] = defaultdict(_Calls)

    async def run(self, caller: str, calls: Mapping[int, Coroutine[Any, Any, Any]]) -> Answers:
        """Start all calls, and return the answers that come within a moment."""
        mine = self._callers[caller]
        tasks = {number: asyncio.ensure_future(call) for number, call in calls.items()}
        await asyncio.wait(tasks.values(), timeout=_BATCH_TIMEOUT_S)
        return mine.take(tasks)

    async def late_answers(self, caller: str) -> Answers:
        """Wait until calls that `run` returned without are done, and return them."""
        return await self._callers[caller].wait()

    async def error(self, caller: str, number: int) -> None:
        """Raise what the call raised."""
        await self._callers[caller].failed.pop(number)


class _Calls:
    """The calls of one caller that are late, and those whose error was not fetched."""

    def __init__(self) -> None:
        self.failed: dict[int, asyncio.Future[Any]] = {}
        self._late: dict[int, asyncio.Future[Any]] = {}
        self._done: dict[int, asyncio.Future[Any]] = {}
        self._some_done = asyncio.Event()

    def take(self, tasks: Mapping[int, asyncio.Future[Any]]) -> Answers:
        """Sort calls into answers, errors to be fetched, and late ones to be waited for."""
        answers = self._answers({number: task for number, task in tasks.items() if task.done()})
        late = {number: task for number, task in tasks.items() if not task.done()}
        self._late |= late
        for number, task in late.items():
            task.add_done_callback(partial(self._is_done, number))
        return answers._replace(late=tuple(late))

    async def wait(self) -> Answers:
        await self._some_done.wait()
        self._some_done.clear()
        done, self._done = self._done, {}
        return self._answers(done)

    def _is_done(self, number: int, task: asyncio.Future[Any]) -> None:
        self._done[number] = task
        del self._late[number]
        self._some_done.set()

    def _answers(self, done: Mapping[int, asyncio.Future[Any]]) -> Answers:
        failed = {number: task for number, task in done.items() if task.cancelled() or task.exception()}
        self.failed |= failed
        return Answers({n: task.result() for n, task in done.items() if n not in failed}, tuple(failed))
