"""Send concurrent calls of one method of one process together: a call costs Ray a millisecond, whatever is in it.

The first call is sent at once. The calls that are made while it is under way wait for it, and are sent as one batch. So
the busier the caller, the larger the batches. A slow call does not delay the others: after a moment the batch returns
without its answer, and the caller asks for that answer separately.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from grpo.errors import PayloadLost

_BATCH_TIMEOUT_S = 0.05
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Answers = Mapping[int, Any]  # by call number; without the calls that are slow or raised an error
_call_numbers = count()


@dataclass(frozen=True)
class _Call:
    arguments: Arguments
    answers: asyncio.Future[Answers] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CallBatcher:
    """The caller's side of one method.

    `send` brings a batch of calls to the process; `fetch_late` asks for the answer of one call that was slow.
    """

    def __init__(
        self, send: Callable[[Mapping[int, Arguments]], Awaitable[Answers]], fetch_late: Callable[[int], Awaitable[Any]]
    ) -> None:
        self._send, self._fetch_late = send, fetch_late
        self._waiting: dict[int, _Call] = {}
        self._sending: asyncio.Task[None] | None = None

    async def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the answer. Raises what the method raises, and what `send` raises."""
        number, call = next(_call_numbers), _Call((args, kwargs))
        self._waiting[number] = call
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_waiting())
        answers = await call.answers
        return answers[number] if number in answers else await self._fetch_late(number)

    async def _send_waiting(self) -> None:
        while self._waiting:
            calls, self._waiting = self._waiting, {}
            await self._send_batch(calls)
        self._sending = None

    async def _send_batch(self, calls: Mapping[int, _Call]) -> None:
        try:
            answers = await self._send({number: call.arguments for number, call in calls.items()})
        except Exception as error:
            if isinstance(error, PayloadLost) and len(calls) > 1:  # of one call; none of the batch has started
                await asyncio.gather(*(self._send_batch({number: call}) for number, call in calls.items()))
                return
            for call in calls.values():
                if not call.answers.done():  # its caller was cancelled
                    call.answers.set_exception(error)
        else:
            for call in calls.values():
                if not call.answers.done():
                    call.answers.set_result(answers)


class BatchRunner:
    """The process's side: runs the calls of a batch concurrently."""

    def __init__(self) -> None:
        self._late: dict[int, asyncio.Future[Any]] = {}

    async def run(self, calls: Mapping[int, Coroutine[Any, Any, Any]]) -> Answers:
        """Start all calls, and return the answers that come within a moment."""
        tasks = {number: asyncio.ensure_future(call) for number, call in calls.items()}
        await asyncio.wait(tasks.values(), timeout=_BATCH_TIMEOUT_S)
        answers = {number: task.result() for number, task in tasks.items() if task.done() and not task.exception()}
        self._late |= {number: task for number, task in tasks.items() if number not in answers}
        return answers

    async def late_answer(self, number: int) -> Any:
        """Wait for the answer of a call that `run` returned without. Raises what the call raises."""
        return await self._late.pop(number)
