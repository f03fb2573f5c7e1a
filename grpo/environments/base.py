"""The Environment protocol and the messages that it exchanges with the policy. No tokens here."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call that the policy asks for. `arguments` are None if they could not be parsed; `raw` is what it wrote."""

    id: str
    name: str
    arguments: Mapping[str, Any] | None
    raw: str = ""


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `reasoning` is the part of an answer before its content, between think tags.

    A message of role tool answers the call `tool_call_id` of the tool `name`.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Opening:
    """The messages before the first turn, and the JSON schemas of the tools that the policy may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Reply:
    """The answer to one turn: messages for the policy, the reward of the turn, and whether the episode is over.

    `metrics` are summed over an episode, and their means over episodes are reported as `episode/<name>`.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    reward: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """What the policy acts in during one episode. A task makes one for each completion: `environment(problem, seed)`.

    `seed` is the same for all episodes of a group: they must begin alike, since advantages compare them.
    Every method may be `def` instead of `async def`; it then runs in a thread. `score` and `close` may be left out.
    Acquire what `close` frees in `begin`, not in the constructor.

    Example:
        class Echo:                      # the policy has to repeat a word
            def __init__(self, problem, seed):
                self.problem = problem

            def begin(self):
                return Opening((Message("user", f"Say {self.problem.answer}."),))

            def reply(self, said):
                right = said.content.strip() == self.problem.answer
                return Reply((Message("user", "No. Try again."),), done=right, reward=float(right))

        class EchoTask:                  # a Task: see grpo/tasks/base.py
            def environment(self, problem, seed):
                return Echo(problem, seed)
    """

    def begin(self) -> Opening | Awaitable[Opening]:
        """Return the first messages. They must be the same for all episodes of a group."""
        ...

    def reply(self, said: Message) -> Reply | Awaitable[Reply]:
        """Answer the policy's turn."""
        ...

    def score(self) -> float | Awaitable[float]:
        """Return the reward of the episode once it is over, finite; without this method, the sum of its turns'."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Free what the episode holds. It is called once, also after a time-out or an error, when no method runs.

        One that still runs in a thread has ten seconds to return; `close` is left out, with a warning, if it doesn't.
        """
        ...
