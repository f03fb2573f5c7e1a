"""What takes the calls of one actor, whatever the transport: Ray's is in ray_actor.py, the one here is an object.

Most actors are one process; one of several ranks is a `Gang` of them. The object in this process lets tests run the
real loop without a cluster; it can be killed like a process.
"""

# MERGED: An actor of several ranks: processes that compute together, and live and die together.
#
# A call goes to every rank, and the next one is sent when all have answered: each of them makes the same calls in the
# same order, as collectives need it. Only what rank 0 does alone goes beside. A rank that dies leaves the
# others waiting
# in one, or with an error of their transport; in either case the actor has died, and whoever replaces it ends what is
# left of it.
#

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from grpo.errors import ActorDied
from grpo.telemetry.recording import TelemetryBatch
from grpo.utils.aio import gather_or_cancel

_random = random.SystemRandom()  # processes must not draw alike


class Endpoint(Protocol):
    """An actor. Every call raises ActorDied when a process of it is gone, also one that is under way as it dies."""

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """The answer; that of rank 0 where there are several."""
        ...

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """The answers of all ranks, in their order."""
        ...

    async def wait_scheduled(self) -> None:
        """Returns when the actor runs somewhere: a cluster may have no room for it yet."""
        ...

    async def ping(self) -> None:
        """Returns when the actor answers."""
        ...

    async def wait_dead(self) -> NoReturn:
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

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        """What the process has recorded; `keep_recording` says whether it is to record spans from now on."""
        ...

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return [await self.invoke(method, args, kwargs)]

    def processes(self) -> Sequence[Process]:
        return (self,)


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


class Gang(Endpoint):
    """The ranks in their order. `release` gives back the place that they held, once they have been ended."""

    def __init__(self, ranks: Sequence[Process], release: Callable[[], None], apart: Collection[str] = ()) -> None:
        self._ranks, self._release, self._apart = tuple(ranks), release, apart
        self._turn = asyncio.Lock()
        self._killed = False

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        answer, *_ = await self.call(method, args, kwargs)
        return answer

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """The answers of all ranks; `setup` is told where they meet. Methods in `apart` are calls to rank 0 alone.

        The first error of a rank is raised, and not waited for the others: they may be waiting for it.
        """
        if method in self._apart:
            return [await self._ranks[0].invoke(method, args, kwargs)]
        async with self._turn:
            if method == "setup":
                args = (*args, await self.rendezvous())
            try:
                return await gather_or_cancel(*(rank.invoke(method, args, kwargs) for rank in self._ranks))
            except Exception:
                await self.ping()  # raises ActorDied where the error only follows from the death of another rank
                raise

    async def wait_scheduled(self) -> None:
        await gather_or_cancel(*(rank.wait_scheduled() for rank in self._ranks))

    async def ping(self) -> None:
        await gather_or_cancel(*(rank.ping() for rank in self._ranks))

    async def rendezvous(self) -> tuple[str, int]:
        return await self._ranks[0].rendezvous()

    async def wait_dead(self) -> NoReturn:
        await gather_or_cancel(*(rank.wait_dead() for rank in self._ranks))
        raise ActorDied("all ranks ended")

    def processes(self) -> Sequence[Process]:
        return self._ranks

    def kill(self, *, hung: bool = False) -> None:
        for rank in self._ranks:
            rank.kill(hung=hung)
        if not self._killed:
            self._killed = True
            self._release()
