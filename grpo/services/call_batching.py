"""Calls of one method of one process that travel together: a call costs Ray a millisecond, whatever is in it.

The first one goes at once. Those that are made while it is under way wait for it and go in one, and so on: the busier,
the more of them share a call. What takes long holds up nobody: it is left behind after a moment, and its answer is
asked for by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from grpo.errors import PayloadLost

_PATIENCE_S = 0.05
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Answers = Mapping[int, Any]  # by number; without those of calls that take long, or have raised something
_numbers = count()


@dataclass(frozen=True)
class _Call:
    arguments: Arguments
    answers: asyncio.Future[Answers] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CallBatcher:
    """The caller's side. `send` brings calls to the process, `late` asks it for the answer of one by itself."""

    def __init__(
        self, send: Callable[[Mapping[int, Arguments]], Awaitable[Answers]], late: Callable[[int], Awaitable[Any]]
    ) -> None:
        self._send, self._late = send, late
        self._waiting: dict[int, _Call] = {}
        self._sending: asyncio.Task[None] | None = None

    async def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer. Raises what the method raises, and what `send` does."""
        number, call = next(_numbers), _Call((args, kwargs))
        self._waiting[number] = call
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        answers = await call.answers
        return answers[number] if number in answers else await self._late(number)

    async def _send_all(self) -> None:
        while self._waiting:
            calls, self._waiting = self._waiting, {}
            await self._send_some(calls)
        self._sending = None

    async def _send_some(self, calls: Mapping[int, _Call]) -> None:
        try:
            answers = await self._send({number: call.arguments for number, call in calls.items()})
        except Exception as error:
            if isinstance(error, PayloadLost) and len(calls) > 1:  # that of one call, and none has begun
                await asyncio.gather(*(self._send_some({number: call}) for number, call in calls.items()))
                return
            for call in calls.values():
                if not call.answers.done():  # its caller was cancelled
                    call.answers.set_exception(error)
        else:
            for call in calls.values():
                if not call.answers.done():
                    call.answers.set_result(answers)


class BatchedWork:
    """The side of the process."""

    def __init__(self) -> None:
        self._late: dict[int, asyncio.Future[Any]] = {}

    async def answers(self, calls: Mapping[int, Coroutine[Any, Any, Any]]) -> Answers:
        """Begin all of them; what they return within a moment."""
        tasks = {number: asyncio.ensure_future(call) for number, call in calls.items()}
        await asyncio.wait(tasks.values(), timeout=_PATIENCE_S)
        returned = {number: task.result() for number, task in tasks.items() if task.done() and not task.exception()}
        self._late |= {number: task for number, task in tasks.items() if number not in returned}
        return returned

    async def late(self, number: int) -> Any:
        """The answer of one that was not among those. Raises what it raises."""
        return await self._late.pop(number)
