"""Marks for actor methods: they tell the services how a call travels, and who gets it.

Example:

    class Generator:
        @returns_payload
        async def generate(self, prompt, params) -> tuple[list[Completion], GenerationReport]:
            ...  # the driver gets (reference to the completions, report)

        @replayed_on_join
        async def update_weights(self, weights) -> GeneratorStats:
            ...  # a replica that joins later gets the newest weights before it serves
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def methods_marked(cls: type, mark: str) -> frozenset[str]:
    """Return the names of the methods of an actor class that bear one of the marks below."""
    return frozenset(name for name in dir(cls) if hasattr(getattr(cls, name), mark))


def replayed_on_join(method: F) -> F:
    """Replay the last fanout of this method on every replica that joins later, before it serves."""
    method.replayed_on_join = True  # type: ignore[attr-defined]
    return method


def returns_payload(method: F) -> F:
    """Return a pair (payload, report), of which the payload stays on the node that made it.

    The caller awaits a reference to the payload (tokens, weights) and the report. It passes the reference on, by itself
    or as a field of a dataclass; the actor that receives it sees the value.
    """
    method.returns_payload = True  # type: ignore[attr-defined]
    return method


def rank_zero_only(method: F) -> F:
    """Send calls of this method to rank 0 alone, concurrently with the calls that all ranks share."""
    method.rank_zero_only = True  # type: ignore[attr-defined]
    return method


def batched(method: F) -> F:
    """Send concurrent calls of this method together. It can't return a payload."""
    method.batched = True  # type: ignore[attr-defined]
    return method


def copied_to_driver(method: F) -> F:
    """Copy the newest payload of this method to the driver's node, in the background.

    For payloads that are still needed when the node that made them is lost.
    """
    method.copied_to_driver = True  # type: ignore[attr-defined]
    return method
