"""What takes the calls of one actor, whatever the transport: Ray's is in ray_actor.py, the one here is an object.

Most actors are one process; one of several ranks is a `Gang` of them. The object in this process lets tests run the
real loop without a cluster; it can be killed like a process.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from grpo.telemetry.recording import Harvest, Recording, context_for
from grpo.types import ActorDied

_random = random.SystemRandom()  # processes must not draw alike


class Endpoint(Protocol):
    """An actor. Every call raises ActorDied when a process of it is gone, also one that is under way as it dies."""

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """The answer; that of rank 0 where there are several."""
        ...

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """The answers of all ranks, in their order."""
        ...

    async def placed(self) -> None:
        """Returns when the actor runs somewhere: a cluster may have no room for it yet."""
        ...

    async def ping(self) -> None:
        """Returns when the actor answers."""
        ...

    async def until_death(self) -> NoReturn:
        """Raises ActorDied as soon as a process is gone."""
        ...

    async def rendezvous(self) -> tuple[str, int]:
        """Host and port at which the actor, or its rank 0, can wait for others."""
        ...

    def processes(self) -> Sequence[Process]:
        """All that there are, in the order of their ranks."""
        ...

    def kill(self, *, hung: bool = False) -> None:
        """End the actor at once; with `hung`, also one that answers nobody."""
        ...


class Process(Endpoint, Protocol):
    """An actor of one process, or one rank of it."""

    name: str

    async def harvest(self, *, go_on: bool) -> Harvest:
        """What the process has recorded; `go_on` says whether it is to record spans from now on."""
        ...

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return [await self.invoke(method, args, kwargs)]

    def processes(self) -> Sequence[Process]:
        return (self,)


class LocalEndpoint(Process):
    """An object in this process, that can be killed like one of its own; a fake needs neither `setup` nor `close`.

    Payloads are copied: actors write to their buffers again, and a process border would have kept them apart.
    """

    def __init__(self, actor: Any, name: str = "actor") -> None:
        self.actor, self.name = actor, name
        self._recording = Recording()
        self._calls: set[asyncio.Task[Any]] = set()
        self._dead = asyncio.Event()
        self._closing: asyncio.Future[Any] | None = None

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._raise_if_dead()
        if method in ("setup", "close") and not hasattr(self.actor, method):
            return None
        if method == "close":
            self._closing = asyncio.get_running_loop().create_future()
        work = getattr(self.actor, method)(*args, **kwargs or {})
        call = asyncio.get_running_loop().create_task(work, context=context_for(self._recording))
        self._calls.add(call)
        try:
            result = await call
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or not caller.cancelling():
                self._raise_if_dead()
            raise
        finally:
            self._calls.discard(call)
        if hasattr(getattr(self.actor, method), "returns_payload"):
            payload, report = result
            return pickle.loads(pickle.dumps(payload)), report
        return result

    async def placed(self) -> None:
        self._raise_if_dead()

    async def ping(self) -> None:
        self._raise_if_dead()

    async def harvest(self, *, go_on: bool) -> Harvest:
        self._raise_if_dead()
        return self._recording.harvest(go_on=go_on)

    async def rendezvous(self) -> tuple[str, int]:
        self._raise_if_dead()
        return "127.0.0.1", free_port()

    async def until_death(self) -> NoReturn:
        await self._dead.wait()
        raise self._death()

    def kill(self, *, hung: bool = False) -> None:
        self._dead.set()
        for call in self._calls:
            call.cancel()
        if self._closing is None and hasattr(self.actor, "close"):
            self._closing = asyncio.ensure_future(self.actor.close())  # its threads, which a process takes with it

    def _raise_if_dead(self) -> None:
        if self._dead.is_set():
            raise self._death()

    def _death(self) -> ActorDied:
        return ActorDied(f"{self.name} died: it was killed")


def free_port() -> int:
    """One of this machine that nobody listens at.

    It is below those that systems give to outgoing connections, one of which could take it before it is used.
    """
    while True:
        port = _random.randrange(20_000, 32_768)
        with suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            return port


Spawn = Callable[[str], Endpoint]  # starts an actor of the given name
