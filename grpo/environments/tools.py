"""Environments made of tools: functions of any module, or the methods of an object."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from grpo.environments.base import Message, Opening, Reply, ToolCall
from grpo.environments.calls import UserCalls
from grpo.errors import ConfigError
from grpo.types import Problem
from grpo.utils.aio import being_cancelled

_RESERVED = {"reset", "reward", "close"}
_schemas: WeakKeyDictionary[Callable[..., Any], Mapping[str, Any]] = WeakKeyDictionary()


class Tools:
    """Functions that the policy may call, by name. Their schemas come from signatures and docstrings.

    Example:
        def calculate(expression: str) -> str:
            \"\"\"Evaluate an arithmetic expression.

            Args:
                expression: for example 3 * (4 + 5)
            \"\"\"

        tools = Tools([calculate], UserCalls(threads=8))
        replies, errors = await tools.answer(message.tool_calls)

    Raises ConfigError for a function without a docstring or type hints, and for two of one name.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], calls: UserCalls, *, key: str) -> None:
        self._calls = calls
        try:
            self._functions = {function.__name__: function for function in functions}
            self.schemas: tuple[Mapping[str, Any], ...] = tuple(map(_schema, functions))
        except Exception as error:  # transformers has its own kinds
            raise ConfigError(
                f"a tool needs a docstring with its arguments, and type hints: {error}", key=key
            ) from error
        if len(self._functions) < len(functions):
            raise ConfigError("two tools have the same name", key=key)

    async def answer(self, calls: Sequence[ToolCall]) -> tuple[tuple[Message, ...], int]:
        """Make all calls side by side; returns a tool message for each, in order, and how many failed.

        What a call raises, an unknown tool and unparsable arguments become messages to the policy.
        """
        answers = await asyncio.gather(*map(self._answer, calls))
        messages = tuple(
            Message("tool", content, tool_call_id=call.id, name=call.name)
            for call, (content, _) in zip(calls, answers, strict=True)
        )
        return messages, sum(failed for _, failed in answers)

    async def _answer(self, call: ToolCall) -> tuple[str, bool]:
        if call.arguments is None:
            return f"error: this is no call, a JSON object with name and arguments: {call.raw}", True
        if (function := self._functions.get(call.name)) is None:
            return f"error: no tool {call.name!r}; there are {', '.join(self._functions)}", True
        try:
            result = await self._calls.run(function, **call.arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str), False
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # argparse, for example, exits
            if being_cancelled():
                raise
            return f"error: {type(error).__name__}: {error}", True


class ToolEnvironment:
    """A task's question, with tools. The episode is over when the policy answers without a call."""

    def __init__(self, opening: Sequence[Message], tools: Tools, score: Callable[[str], float]) -> None:
        self._opening, self._tools, self._score = tuple(opening), tools, score
        self._answer = ""

    async def begin(self) -> Opening:
        return Opening(self._opening, self._tools.schemas)

    async def reply(self, said: Message) -> Reply:
        self._answer = said.content
        if not said.tool_calls:
            return Reply(done=True)
        messages, failed = await self._tools.answer(said.tool_calls)
        return Reply(messages, metrics={"tool_calls": len(said.tool_calls), "tool_errors": failed})

    def score(self) -> float:
        return self._score(self._answer)

    async def close(self) -> None:
        """Functions hold nothing."""


class ObjectWithTools(Protocol):
    """An object whose public methods, typed and with docstrings, are tools. Each episode has one of its own.

    Example:
        class Light:
            def reset(self, problem):
                self.on = False
                return problem.question            # what the policy is told first; None: the problem's question

            def switch(self) -> str:
                \"\"\"Flip the switch.\"\"\"
                self.on = not self.on
                return "on" if self.on else "off"

            def reward(self):
                return float(self.on)
    """

    def reset(self, problem: Problem) -> str | None: ...

    def reward(self) -> float: ...


class MethodsEnvironment(ToolEnvironment):
    """An environment whose tools are the methods of an object."""

    def __init__(self, target: ObjectWithTools, problem: Problem, calls: UserCalls) -> None:
        # Looked up in the class, since getmembers of an object evaluates its properties.
        names = [name for name, _ in inspect.getmembers(type(target), inspect.isfunction)]
        public = [getattr(target, name) for name in names if not name.startswith("_") and name not in _RESERVED]
        super().__init__((), Tools(public, calls, key="task.target"), lambda answer: target.reward())
        self._target, self._problem, self._calls = target, problem, calls

    async def begin(self) -> Opening:
        told = await self._calls.run(self._target.reset, self._problem)
        return Opening((Message("user", self._problem.question if told is None else told),), self._tools.schemas)

    async def close(self) -> None:
        if (close := getattr(self._target, "close", None)) is not None:
            await self._calls.returned(self._target)
            await self._calls.run(close)


def _schema(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a function. That of a method is the same for all objects: an episode has its own."""
    from transformers.utils import get_json_schema

    key = getattr(function, "__func__", function)
    if key not in _schemas:
        _schemas[key] = get_json_schema(function)
    return _schemas[key]
