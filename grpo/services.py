"""What the loop sees of the actors: four verbs on every method, and the six nouns to call.

    await services.trainer.train_step.call(batch)              every rank of an actor, results by rank
    await services.dataloader.sample.call_one(16)              the one actor; the result of its rank 0
    await services.generator.generate.route(prompt, params)    one replica of a service, the least loaded
    await services.generator.update_weights.fanout(weights)    every replica, results by replica

An exception in the actor is raised at the await, with its type. A call that a dying process takes with it is made
again, by another replica or by the replacement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Protocol, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Method(Protocol):
    """One method of an actor, callable in four ways."""

    async def call_one(self, *args: Any, **kwargs: Any) -> Any: ...

    async def call(self, *args: Any, **kwargs: Any) -> list[Any]: ...

    async def route(self, *args: Any, **kwargs: Any) -> Any: ...

    async def fanout(self, *args: Any, **kwargs: Any) -> list[Any]: ...

    def for_newcomers(self, *args: Any) -> None:
        """A new replica gets this call before it serves, as it gets the last fanout."""
        ...


class Newcomer(Protocol):
    """A process that replaces one that died, before it serves: its methods by name, of which `call_one` works."""

    def __getattr__(self, method: str) -> OneCall: ...


class OneCall(Protocol):
    async def call_one(self, *args: Any, **kwargs: Any) -> Any: ...


Restore = Callable[[Any], Awaitable[None]]  # takes a Newcomer


class OnDemand:
    """An argument of a fanout, or for newcomers: fetched when it is needed, if ever, and anew when it was lost."""

    def __init__(self, fetch: Callable[[], Awaitable[Any]]) -> None:
        self._fetch, self._fetching = fetch, asyncio.Lock()
        self._value: Any = None

    async def value(self) -> Any:
        async with self._fetching:
            if self._value is None:
                self._value = await self._fetch()
        return self._value

    def forget(self, value: Any) -> None:
        """Fetch it anew the next time, unless that was done already."""
        if self._value is value:
            self._value = None


class Handle(Protocol):
    """An actor or a service: its methods by name."""

    def __getattr__(self, method: str) -> Method: ...

    def on_restart(self, restore: Restore) -> None:
        """Have `restore` called with every replacement of a process that died."""
        ...

    def figures(self) -> dict[str, dict[str, Any]]:
        """State, requests, failures, calls under way and mean latency of every replica, by its name."""
        ...

    def sources(self) -> Iterable[Any]:
        """The processes that answer at the moment: their `name`, and what they have recorded by `harvest`."""
        ...

    async def until_gone(self, sources: Iterable[Any]) -> NoReturn:
        """Raises ActorDied as soon as one of these processes answers no more, or is to leave."""
        ...

    async def rendezvous(self) -> tuple[str, int]:
        """Host and port at which the actor, or its rank 0, can wait for others. Raises ActorDied."""
        ...

    def scale(self, replicas: int) -> None:
        """Start replicas, or let the last ones leave when they have finished what they have."""
        ...

    def session(self) -> Handle:
        """A handle whose routed calls keep to one replica, as long as that lives."""
        ...


@dataclass(frozen=True)
class Services:
    """The nouns of the picture.

    The reference exists only when the loss has a KL term. The evaluator is a generator that only evaluations use; a
    run without one borrows the training's. The checkpointer is there when checkpoints are written or resumed from.
    """

    dataloader: Handle
    generator: Handle
    reward: Handle
    replay_buffer: Handle
    trainer: Handle
    reference: Handle | None = None
    evaluator: Handle | None = None
    checkpointer: Handle | None = None

    def figures(self) -> dict[str, dict[str, Any]]:
        """Those of every replica of every actor."""
        return {name: figures for replicas in self.replicas().values() for name, figures in replicas.items()}

    def replicas(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The same, by actor."""
        return {name: handle.figures() for name, handle in self._handles().items()}

    def sources(self) -> Iterable[Any]:
        """The processes of all actors that answer at the moment."""
        return [source for handle in self._handles().values() for source in handle.sources()]

    def _handles(self) -> dict[str, Handle]:
        handles = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: handle for name, handle in handles.items() if handle is not None}


@dataclass(frozen=True)
class EvaluationServices:
    """Who hands out held-out prompts, who answers them, and who scores the answers."""

    dataloader: Handle
    generator: Handle
    reward: Handle


def methods_marked(cls: type, mark: str) -> frozenset[str]:
    """The names of the methods of an actor class that bear one of the marks below."""
    return frozenset(name for name in dir(cls) if hasattr(getattr(cls, name), mark))


def brings_up_to_date(method: F) -> F:
    """Mark an actor method whose last fanout a new replica gets before it serves."""
    method.brings_up_to_date = True  # type: ignore[attr-defined]
    return method


def returns_payload(method: F) -> F:
    """Mark an actor method whose result is a pair (payload, report).

    The payload (tokens, weights) stays on the node that made it: the caller awaits a reference to it and the report,
    and passes the reference on, by itself or as a field of a dataclass. The actor that receives it sees the value.
    """
    method.returns_payload = True  # type: ignore[attr-defined]
    return method


def of_rank_0(method: F) -> F:
    """Mark an actor method that only rank 0 is asked, beside whatever all ranks do together."""
    method.of_rank_0 = True  # type: ignore[attr-defined]
    return method


def travels_gathered(method: F) -> F:
    """Mark an actor method that many call side by side: calls made at about the same time travel together.

    It returns no payload.
    """
    method.travels_gathered = True  # type: ignore[attr-defined]
    return method


def outlives_its_node(method: F) -> F:
    """Mark an actor method whose last payload is still needed when the node that made it is lost.

    On a cluster of several nodes it is copied to the driver's, beside whatever goes on.
    """
    method.outlives_its_node = True  # type: ignore[attr-defined]
    return method
