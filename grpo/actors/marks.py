"""What the loop sees of the actors: four verbs on every method, and the six nouns to call.

    await services.trainer.train_step.call(batch)              every rank of an actor, results by rank
    await services.dataloader.sample.call_one(16)              the one actor; the result of its rank 0
    await services.generator.generate.route(prompt, params)    one replica of a service, the least loaded
    await services.generator.update_weights.fanout(weights)    every replica, results by replica

An exception in the actor is raised at the await, with its type. A call that a dying process takes with it is made
again, by another replica or by the replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def methods_marked(cls: type, mark: str) -> frozenset[str]:
    """The names of the methods of an actor class that bear one of the marks below."""
    return frozenset(name for name in dir(cls) if hasattr(getattr(cls, name), mark))


def replayed_on_join(method: F) -> F:
    """Mark an actor method whose last fanout a new replica gets before it serves."""
    method.replayed_on_join = True  # type: ignore[attr-defined]
    return method


def returns_payload(method: F) -> F:
    """Mark an actor method whose result is a pair (payload, report).

    The payload (tokens, weights) stays on the node that made it: the caller awaits a reference to it and the report,
    and passes the reference on, by itself or as a field of a dataclass. The actor that receives it sees the value.
    """
    method.returns_payload = True  # type: ignore[attr-defined]
    return method


def rank_zero_only(method: F) -> F:
    """Mark an actor method that only rank 0 is asked, beside whatever all ranks do together."""
    method.rank_zero_only = True  # type: ignore[attr-defined]
    return method


def batched(method: F) -> F:
    """Mark an actor method that many call side by side: calls made at about the same time travel together.

    It returns no payload.
    """
    method.batched = True  # type: ignore[attr-defined]
    return method


def copied_to_driver(method: F) -> F:
    """Mark an actor method whose last payload is still needed when the node that made it is lost.

    On a cluster of several nodes it is copied to the driver's, beside whatever goes on.
    """
    method.copied_to_driver = True  # type: ignore[attr-defined]
    return method
