"""Interchangeable replicas behind one name.

Callers wait while no replica is healthy. Whatever can't be mended by a new process, or was not for too often, becomes
the service's error: every caller gets it, and the run ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NoReturn

from grpo.actors.marks import methods_marked
from grpo.actors.specs import ActorSpec
from grpo.config.schema import RunConfig
from grpo.errors import ActorDied, PayloadLost
from grpo.services.endpoint import Process, Spawn
from grpo.services.failures import Failures
from grpo.services.replica import Call, PreemptionState, Replica, ServiceContext, State, Timeouts
from grpo.utils.aio import cancel_and_wait, gather_or_cancel


class Service:
    """Replicas of one actor, each kept alive by a task; an actor of its own is a service of one.

    `updates` names methods whose last fanout a newcomer has to get before it serves.
    """

    def __init__(
        self,
        name: str,
        context: ServiceContext,
        replicas: int,
        *,
        optional_replicas: int = 0,
        updates: frozenset[str] = frozenset(),
    ) -> None:
        self.name, self.context = name, context
        self._updates = updates
        self._error: BaseException | None = None
        self._numbers = count()
        self._alone = replicas + optional_replicas == 1
        self._supervisors: dict[Replica, asyncio.Task[None]] = {}
        for i in range(replicas + optional_replicas):
            self._add(optional=i >= replicas)

    @property
    def replicas(self) -> Sequence[Replica]:
        return tuple(self._supervisors)

    async def ready(self) -> None:
        """Wait until all replicas that are not optional serve; raises what keeps one from it."""
        needed = [replica for replica in self._supervisors if not replica.optional]
        await self._until(lambda: all(replica.state is State.HEALTHY for replica in needed))

    async def available(self, preferred: Replica | None = None) -> Replica:
        """The preferred replica where that is healthy, else the healthy one with the fewest calls under way."""
        await self._until(self.healthy)
        healthy = self.healthy()
        return preferred if preferred in healthy else min(healthy, key=lambda replica: replica.in_flight)

    async def call_replica(self, replica: Replica, call: Call) -> list[Any]:
        """The answers of this very replica, by rank, whoever takes its place. Raises ActorDied when it was removed."""
        while True:
            await self._until(lambda: replica.state in (State.HEALTHY, State.STOPPED))
            if replica.state is State.STOPPED:
                raise ActorDied(f"{replica.name} was removed")
            with suppress(ActorDied):
                return await replica.attempt(call)

    async def fanout(self, call: Call) -> list[Any]:
        """The answers of all that are healthy and stay so; at least one. What was lost is fetched anew."""
        if call.method in self._updates:
            self.set_join_call(call)
        while True:
            await self._until(self.healthy)
            fetched = await call.fetched()
            try:
                answers = await gather_or_cancel(*(_unless_it_dies(replica, fetched) for replica in self.healthy()))
            except PayloadLost as error:
                if not call.forget(fetched):
                    raise
                self.context.failures.warn(f"{error}; it is fetched anew")
                continue
            if any(answers):
                return [result for answer in answers for result in answer]

    def set_join_call(self, call: Call) -> None:
        """What they have to be given before they serve, in the place of what was so far."""
        self.context.latest = call
        self.context.changed.notify()

    async def wait_member_lost(self, processes: Sequence[Process]) -> NoReturn:
        """Raises ActorDied as soon as one of them serves no more."""

        def gone() -> list[str]:
            serving = self.processes()
            return [process.name for process in processes if process not in serving]

        names = await self.context.changed.wait_for(gone)
        raise ActorDied(f"{', '.join(names)} left")

    def scale(self, replicas: int) -> None:
        """Start more, or let some finish what they have and leave, the healthy ones last; at least one stays."""
        there = [replica for replica in self._supervisors if replica.state is not State.STOPPED]
        for _ in range(replicas - len(there)):
            self._add(optional=True)
        for replica in sorted(there, key=lambda each: each.state is not State.HEALTHY)[max(1, replicas) :]:
            replica.stop()

    def replica_stats(self) -> dict[str, dict[str, Any]]:
        """Of every replica, by its name."""
        return {replica.name: replica.stats() for replica in self._supervisors}

    async def close(self, patience_s: float) -> None:
        """Ask every process to close, and end those that don't."""
        replicas, lives = self.replicas, tuple(self._supervisors.values())
        self._error = self._error or ActorDied(f"{self.name} was closed")
        self.context.changed.notify()
        await cancel_and_wait(lives)
        await asyncio.gather(*(replica.close(patience_s) for replica in replicas))

    def _add(self, *, optional: bool) -> None:
        number = next(self._numbers)
        name = self.name if self._alone and number == 0 else f"{self.name}-{number}"
        replica = Replica(name, self.context, optional=optional)
        self._supervisors[replica] = asyncio.create_task(replica.supervise(), name=f"supervisor of {name}")
        self._supervisors[replica].add_done_callback(lambda life: self._supervisor_done(replica, life))

    def _supervisor_done(self, replica: Replica, life: asyncio.Task[None]) -> None:
        if life.cancelled():
            return
        if (error := life.exception()) is None:
            del self._supervisors[replica]  # it was stopped
        else:
            self._error = self._error or error
            self.context.failures.end(error)
        self.context.changed.notify()

    def processes(self) -> list[Process]:
        """Of those that serve at the moment, rank by rank."""
        endpoints = (replica.endpoint for replica in self.healthy())
        return [process for endpoint in endpoints if endpoint is not None for process in endpoint.processes()]

    def healthy(self) -> list[Replica]:
        """Those that serve at the moment."""
        return [replica for replica in self._supervisors if replica.state is State.HEALTHY]

    async def _until(self, condition: Callable[[], Any]) -> None:
        await self.context.changed.wait_for(lambda: self._error or condition())
        if self._error is not None:
            raise self._error


async def _unless_it_dies(replica: Replica, call: Call) -> list[Any]:
    """The answer, that of rank 0, if there is one."""
    try:
        return (await replica.attempt(call))[:1]
    except ActorDied:
        return []


def make_service(
    spec: ActorSpec, spawn: Spawn, failures: Failures, config: RunConfig, preemption: PreemptionState
) -> Service:
    """The service that an actor's entry in the plan asks for."""
    recovery = config.recovery
    timeouts = Timeouts(config.cluster.start_timeout_s, recovery.health_interval_s, recovery.health_timeout_s)
    return Service(
        spec.name,
        ServiceContext(spawn, failures, timeouts, preemption),
        spec.replicas,
        optional_replicas=spec.optional_replicas,
        updates=methods_marked(spec.cls, "replayed_on_join"),
    )
