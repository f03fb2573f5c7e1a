"""Interchangeable replicas behind one name.

Callers wait while no replica is healthy. An error that no new process can fix, or that uses up the budget of restarts,
becomes the error of the service: it is raised to every caller, and the run ends.
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


def make_service(
    spec: ActorSpec, spawn: Spawn, failures: Failures, config: RunConfig, preemption: PreemptionState
) -> Service:
    """Start the service of an actor: its replicas begin to start at once."""
    recovery = config.recovery
    timeouts = Timeouts(config.cluster.start_timeout_s, recovery.health_interval_s, recovery.health_timeout_s)
    return Service(
        spec.name,
        ServiceContext(spawn, failures, timeouts, preemption),
        spec.replicas,
        optional_replicas=spec.optional_replicas,
        replayed_on_join=methods_marked(spec.cls, "replayed_on_join"),
    )


class Service:
    """Replicas of one actor, each kept alive by a supervisor task. A single actor is a service of one replica.

    `replayed_on_join` names the methods whose last fanout a new process gets before it serves.
    """

    def __init__(
        self,
        name: str,
        context: ServiceContext,
        replicas: int,
        *,
        optional_replicas: int = 0,
        replayed_on_join: frozenset[str] = frozenset(),
    ) -> None:
        self.name, self.context = name, context
        self._replayed_on_join = replayed_on_join
        self._error: BaseException | None = None
        self._numbers = count()
        self._single = replicas + optional_replicas == 1
        self._supervisors: dict[Replica, asyncio.Task[None]] = {}
        for i in range(replicas + optional_replicas):
            self._add(optional=i >= replicas)

    @property
    def replicas(self) -> Sequence[Replica]:
        return tuple(self._supervisors)

    def healthy(self) -> list[Replica]:
        return [replica for replica in self._supervisors if replica.healthy]

    def processes(self) -> list[Process]:
        """Return the processes of the healthy replicas, rank by rank."""
        endpoints = (replica.endpoint for replica in self.healthy())
        return [process for endpoint in endpoints if endpoint is not None for process in endpoint.processes()]

    async def ready(self) -> None:
        """Wait until all required replicas are healthy. Raises the error that keeps one from it."""
        required = [replica for replica in self._supervisors if not replica.optional]
        await self._wait_until(lambda: all(replica.healthy for replica in required))

    async def available(self) -> Replica:
        """Wait for a healthy replica; return the one with the fewest calls under way."""
        await self._wait_until(self.healthy)
        return min(self.healthy(), key=lambda replica: replica.in_flight)

    async def call_replica(self, replica: Replica, call: Call) -> list[Any]:
        """Return the answers of this replica by rank, repeating the call when its process is replaced.

        Raises ActorDied when the replica was removed.
        """
        while True:
            await self._wait_until(lambda: replica.healthy or replica.state is State.STOPPED)
            if replica.state is State.STOPPED:
                raise ActorDied(f"{replica.name} was removed")
            with suppress(ActorDied):
                return await replica.attempt(call)

    async def fanout(self, call: Call) -> list[Any]:
        """Return the answers of the replicas that are healthy and stay alive, at least one; rank 0 of each.

        A lazy argument that was lost is fetched again.
        """
        if call.method in self._replayed_on_join:
            self.set_join_call(call)
        while True:
            await self._wait_until(self.healthy)
            resolved = await call.resolve()
            try:
                answers = await gather_or_cancel(*(_rank_zero_answer(replica, resolved) for replica in self.healthy()))
            except PayloadLost as error:
                if not call.invalidate(resolved):
                    raise
                self.context.failures.warn(f"{error}; fetching it again")
                continue
            if any(answers):
                return [result for answer in answers for result in answer]

    def set_join_call(self, call: Call) -> None:
        """Make this call on every process that joins from now on; it replaces the last one."""
        self.context.join_call = call
        self.context.changed.notify()

    async def wait_member_lost(self, processes: Sequence[Process]) -> NoReturn:
        """Raise ActorDied as soon as one of these processes is no longer in service."""

        def lost() -> list[str]:
            serving = self.processes()
            return [process.name for process in processes if process not in serving]

        names = await self.context.changed.wait_for(lost)
        raise ActorDied(f"{', '.join(names)} left")

    def scale(self, replicas: int) -> None:
        """Add optional replicas, or stop some: replicas that are not healthy first, and never the last one."""
        current = [replica for replica in self._supervisors if replica.state is not State.STOPPED]
        for _ in range(replicas - len(current)):
            self._add(optional=True)
        for replica in sorted(current, key=lambda replica: not replica.healthy)[max(1, replicas) :]:
            replica.stop()

    def replica_stats(self) -> dict[str, dict[str, Any]]:
        """Return the statistics of every replica by its name."""
        return {replica.name: replica.stats() for replica in self._supervisors}

    async def close(self, patience_s: float) -> None:
        """Let every process close itself within `patience_s`, then kill it."""
        replicas, supervisors = self.replicas, tuple(self._supervisors.values())
        self._error = self._error or ActorDied(f"{self.name} was closed")
        self.context.changed.notify()
        await cancel_and_wait(supervisors)
        await asyncio.gather(*(replica.close(patience_s) for replica in replicas))

    def _add(self, *, optional: bool) -> None:
        number = next(self._numbers)
        name = self.name if self._single and number == 0 else f"{self.name}-{number}"
        replica = Replica(name, self.context, optional=optional)
        self._supervisors[replica] = asyncio.create_task(replica.supervise(), name=f"supervisor of {name}")
        self._supervisors[replica].add_done_callback(lambda task: self._supervisor_done(replica, task))

    def _supervisor_done(self, replica: Replica, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            del self._supervisors[replica]  # it was stopped
        else:
            self._error = self._error or error
            self.context.failures.end(error)
        self.context.changed.notify()

    async def _wait_until(self, condition: Callable[[], Any]) -> None:
        await self.context.changed.wait_for(lambda: self._error or condition())
        if self._error is not None:
            raise self._error


async def _rank_zero_answer(replica: Replica, call: Call) -> list[Any]:
    """Return the answer of rank 0 as a list of one; it is empty when the replica dies."""
    try:
        return (await replica.attempt(call))[:1]
    except ActorDied:
        return []
