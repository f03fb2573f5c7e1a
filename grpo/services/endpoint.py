"""Transport-independent interface to one actor: a single process, or a gang of ranks.

`cluster/actor.py` implements a process on Ray, `services/local.py` one that is an object of this process.
"""

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
    """One actor. A call raises ActorDied when a process of the actor is dead, or dies before it has answered.

    The actor's methods `setup` and `close` are optional: a call of one that is missing returns None.
    """

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Return the answers by rank."""
        ...

    async def wait_scheduled(self) -> None:
        """Return when the actor runs on a node: a cluster may have no room for it yet."""
        ...

    async def ping(self) -> None:
        """Return when the actor answers."""
        ...

    async def wait_dead(self) -> NoReturn:
        """Raise ActorDied as soon as a process is dead."""
        ...

    def processes(self) -> Sequence[Process]:
        """Return the processes by rank."""
        ...

    def kill(self, *, hung: bool = False) -> None:
        """End the actor at once; `hung` also ends a process that no longer responds."""
        ...


class Process(Endpoint, Protocol):
    """An actor of one process, or one rank of a gang."""

    name: str

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Return the answer of this process."""
        ...

    async def rendezvous(self) -> tuple[str, int]:
        """Return a host and a free port at which this process can wait for other processes."""
        ...

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        """Return what the process has recorded; `keep_recording`: record spans from now on."""
        ...

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return [await self.invoke(method, args, kwargs)]

    def processes(self) -> Sequence[Process]:
        return (self,)


Spawn = Callable[[str], Endpoint]  # starts an actor of the given name


class Gang(Endpoint):
    """An actor of several ranks: processes that compute together, and live and die together.

    A call goes to every rank, and the next call is sent when all ranks have answered: collectives need the same calls
    in the same order on each of them. A rank that dies leaves the other ranks waiting in a collective, or with an error
    of their transport. Either way the whole actor counts as dead, and its supervisor kills the ranks that are left.

    `release` frees the room that the ranks held, once they were killed. `rank_zero_only` names the methods that rank 0
    alone is asked.
    """

    def __init__(
        self, ranks: Sequence[Process], release: Callable[[], None], rank_zero_only: Collection[str] = ()
    ) -> None:
        self._ranks, self._release, self._rank_zero_only = tuple(ranks), release, rank_zero_only
        self._one_call = asyncio.Lock()
        self._killed = False

    async def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Return the answers by rank; `setup` gets the rendezvous of rank 0 as its last argument.

        Raises the first error of a rank without waiting for the other ranks: they may wait for the one that failed.
        """
        if method in self._rank_zero_only:
            return [await self._ranks[0].invoke(method, args, kwargs)]
        async with self._one_call:
            if method == "setup":
                args = (*args, await self._ranks[0].rendezvous())
            try:
                return await gather_or_cancel(*(rank.invoke(method, args, kwargs) for rank in self._ranks))
            except Exception:
                await self.ping()  # raises ActorDied where the error only follows from the death of another rank
                raise

    async def wait_scheduled(self) -> None:
        await gather_or_cancel(*(rank.wait_scheduled() for rank in self._ranks))

    async def ping(self) -> None:
        await gather_or_cancel(*(rank.ping() for rank in self._ranks))

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


def free_port() -> int:
    """Return a free port of this machine.

    It lies below the range that systems use for outgoing connections, one of which could take it before it is used.
    """
    while True:
        port = _random.randrange(20_000, 32_768)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
