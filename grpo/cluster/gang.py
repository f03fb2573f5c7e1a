"""An actor of several ranks: processes that compute together, and live and die together.

A call goes to every rank, and the next one is sent when all have answered: each of them makes the same calls in the
same order, as collectives need it. Only what rank 0 does alone goes beside. A rank that dies leaves the others waiting
in one, or with an error of their transport; in either case the actor has died, and whoever replaces it ends what is
left of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from grpo.cluster.endpoints import Endpoint, Process
from grpo.structured import together
from grpo.types import ActorDied


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
                return await together(*(rank.invoke(method, args, kwargs) for rank in self._ranks))
            except Exception:
                await self.ping()  # raises ActorDied where the error only follows from the death of another rank
                raise

    async def placed(self) -> None:
        await together(*(rank.placed() for rank in self._ranks))

    async def ping(self) -> None:
        await together(*(rank.ping() for rank in self._ranks))

    async def rendezvous(self) -> tuple[str, int]:
        return await self._ranks[0].rendezvous()

    async def until_death(self) -> NoReturn:
        await together(*(rank.until_death() for rank in self._ranks))
        raise ActorDied("all ranks ended")

    def processes(self) -> Sequence[Process]:
        return self._ranks

    def kill(self, *, hung: bool = False) -> None:
        for rank in self._ranks:
            rank.kill(hung=hung)
        if not self._killed:
            self._killed = True
            self._release()
