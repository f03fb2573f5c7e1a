"""The four verbs, over any transport.

    call_one   the one actor behind the handle
    call       every rank of a multi-process actor, results by rank
    route      one replica of a service, the one with the fewest calls under way
    fanout     every replica of a service, results by replica

A transport is an `Endpoint`: a process to send a method call to. Ray's is in ray_actor.py; the one here calls an
object in this process, so that tests run the real loop without a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from grpo.structured import together


class Endpoint(Protocol):
    """One process (or object) that takes method calls."""

    async def invoke(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class LocalEndpoint:
    """An object in this process. Payloads are passed as they are."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def invoke(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await getattr(self._actor, method)(*args, **kwargs)


class ActorHandle:
    """A named actor or service. Attributes are its methods: `handle.method.verb(...)`."""

    def __init__(self, name: str, endpoints: Sequence[Endpoint]) -> None:
        self.name = name
        self.endpoints = tuple(endpoints)
        self.in_flight = [0] * len(endpoints)  # calls under way, by replica

    def __getattr__(self, method: str) -> BoundMethod:
        if method.startswith("_"):
            raise AttributeError(method)  # copy and pickle look for such names
        return BoundMethod(self, method)


class BoundMethod:
    """One method of a handle, callable by the four verbs."""

    def __init__(self, handle: ActorHandle, method: str) -> None:
        self._handle, self._method = handle, method

    async def call_one(self, *args: Any, **kwargs: Any) -> Any:
        if len(self._handle.endpoints) != 1:
            raise TypeError(f"{self._handle.name} has {len(self._handle.endpoints)} processes; use call or route")
        return await self._invoke(0, args, kwargs)

    async def route(self, *args: Any, **kwargs: Any) -> Any:
        loads = self._handle.in_flight
        return await self._invoke(loads.index(min(loads)), args, kwargs)

    async def call(self, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._invoke_all(args, kwargs)

    async def fanout(self, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._invoke_all(args, kwargs)

    async def _invoke_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return await together(*(self._invoke(i, args, kwargs) for i in range(len(self._handle.endpoints))))

    async def _invoke(self, replica: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._handle.in_flight[replica] += 1
        try:
            return await self._handle.endpoints[replica].invoke(self._method, args, kwargs)
        finally:
            self._handle.in_flight[replica] -= 1
