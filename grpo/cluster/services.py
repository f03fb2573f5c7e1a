"""Replicas that die and come back.

    starting --setup--> stale --brought up to date--> healthy --died, or does not answer--> unhealthy --> starting ...
                                                        `--removed--> stopped

A task per replica keeps it alive: it starts the process, brings it up to date, watches it, and replaces it when it
dies. Callers wait while no replica is healthy. Whatever can't be mended by a new process, or was not for too often,
becomes the service's error, and every caller gets it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Any, NoReturn

from grpo.cluster.endpoints import Endpoint, Spawn
from grpo.cluster.plan import ActorSpec
from grpo.config import RunConfig
from grpo.failures import Death, Failures
from grpo.structured import Signal, together
from grpo.types import ActorDied, InfrastructureError, LaunchError

log = logging.getLogger(__name__)


class State(StrEnum):
    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Call:
    """A method with its arguments."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Patience:
    """How long a process may take to be up, and how its health is asked for; in seconds."""

    start_s: float = 600.0
    health_every_s: float = 10.0
    health_timeout_s: float = 60.0


class Replica:
    """One place of a service, taken by one process after another. The figures count over all of them."""

    def __init__(self, name: str, *, optional: bool = False) -> None:
        self.name = name
        self.optional = optional  # comes when the cluster has room for it
        self.state = State.STARTING
        self.in_flight = self.requests = self.failures = 0
        self.busy_s = 0.0  # sum over the requests
        self.endpoint: Endpoint | None = None
        self.death: asyncio.Future[ActorDied] = asyncio.get_running_loop().create_future()

    def figures(self) -> dict[str, Any]:
        """For people: state, requests, failures, calls under way, and the mean latency in seconds."""
        return {
            "state": str(self.state),
            "requests": self.requests,
            "failures": self.failures,
            "in_flight": self.in_flight,
            "latency_s": self.busy_s / self.requests if self.requests else None,
        }


class Service:
    """Interchangeable replicas of one actor; an actor of its own is a service of one.

    `updates` names methods whose last fanout a newcomer has to get before it serves. `restore` does whatever else a
    replacement needs.
    """

    def __init__(
        self,
        name: str,
        spawn: Spawn,
        replicas: int,
        failures: Failures,
        patience: Patience,
        *,
        optional_replicas: int = 0,
        updates: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.restore: Callable[[Endpoint], Awaitable[None]] | None = None
        self._spawn, self._failures, self._patience, self._updates = spawn, failures, patience, updates
        self._latest: Call | None = None  # of `updates`
        self._error: Exception | None = None
        self._changed = Signal()
        self._numbers = count()
        self._alone = replicas + optional_replicas == 1
        self._keepers: dict[Replica, asyncio.Task[None]] = {}
        self._former: set[asyncio.Task[None]] = set()  # of replicas that were taken back
        for i in range(replicas + optional_replicas):
            self._add(optional=i >= replicas)

    @property
    def replicas(self) -> Sequence[Replica]:
        return tuple(self._keepers)

    async def ready(self) -> None:
        """Wait until all replicas that are not optional serve; raises what keeps one from it."""
        needed = [replica for replica in self._keepers if not replica.optional]
        await self._until(lambda: all(replica.state is State.HEALTHY for replica in needed))

    async def available(self, preferred: Replica | None = None) -> Replica:
        """The preferred replica where that is healthy, else the healthy one with the fewest calls under way."""
        await self._until(self._healthy)
        healthy = self._healthy()
        return preferred if preferred in healthy else min(healthy, key=lambda replica: replica.in_flight)

    async def attempt(self, replica: Replica, call: Call) -> tuple[bool, Any]:
        """(True, result); or (False, None) when the process died, which is then replaced."""
        endpoint, death = replica.endpoint, replica.death
        assert endpoint is not None
        replica.in_flight += 1
        replica.requests += 1
        started = time.perf_counter()
        try:
            return True, await endpoint.invoke(call.method, call.args, call.kwargs)
        except ActorDied as error:
            replica.failures += 1
            if replica.endpoint is endpoint:  # else its replacement is there already
                if replica.state is State.HEALTHY:
                    replica.state = State.UNHEALTHY
                if not death.done():
                    death.set_result(error)
            return False, None
        finally:
            replica.in_flight -= 1
            replica.busy_s += time.perf_counter() - started
            if replica.state is State.STOPPED:
                self._changed.notify()

    async def insist(self, replica: Replica, call: Call) -> Any:
        """The answer of this very replica, whichever process takes its place."""
        while True:
            await self._until(lambda: replica.state is State.HEALTHY)
            answered, result = await self.attempt(replica, call)
            if answered:
                return result

    async def fanout(self, call: Call) -> list[Any]:
        """The answers of all that are healthy and stay so; at least one."""
        if call.method in self._updates:
            self._latest = call
        while True:
            await self._until(self._healthy)
            answers = await together(*(self.attempt(replica, call) for replica in self._healthy()))
            if results := [result for answered, result in answers if answered]:
                return results

    def scale(self, replicas: int) -> None:
        """Start more, or let the last ones finish what they have and leave; at least one stays."""
        there = [replica for replica in self._keepers if replica.state is not State.STOPPED]
        for _ in range(replicas - len(there)):
            self._add(optional=True)
        for replica in there[max(1, replicas) :]:
            if replica.state is not State.HEALTHY:  # it has nothing to finish
                keeper = self._keepers.pop(replica)
                keeper.cancel()
                self._former.add(keeper)
                _kill(replica)
            replica.state = State.STOPPED
        self._changed.notify()

    def figures(self) -> dict[str, dict[str, Any]]:
        """Of every replica, by its name."""
        return {replica.name: replica.figures() for replica in self._keepers}

    async def close(self, patience_s: float) -> None:
        """Ask every process to close, and end those that don't."""
        replicas = self.replicas
        self._fail(ActorDied(f"{self.name} was closed"))
        await _cancel([*self._keepers.values(), *self._former])
        await asyncio.gather(*(self._close(replica, patience_s) for replica in replicas))

    def _add(self, *, optional: bool) -> None:
        number = next(self._numbers)
        name = self.name if self._alone and number == 0 else f"{self.name}-{number}"
        replica = Replica(name, optional=optional)
        self._keepers[replica] = asyncio.create_task(self._keep(replica), name=f"keep {replica.name}")

    def _healthy(self) -> list[Replica]:
        return [replica for replica in self._keepers if replica.state is State.HEALTHY]

    async def _until(self, condition: Callable[[], Any]) -> None:
        await self._changed.wait_for(lambda: self._error or condition())
        if self._error is not None:
            raise self._error

    async def _keep(self, replica: Replica) -> None:
        """A replica's life, one process after another, until it is stopped."""
        death: Death | None = None
        while replica.state is not State.STOPPED:
            try:
                await self._bring_up(replica, again=death is not None)
                if death is not None:
                    self._failures.actor_is_back(death)
                await self._watch(replica)
            except InfrastructureError as error:
                if death is None and replica.state is State.STARTING and not replica.optional:
                    return self._fail(error)  # it has never been up: another process would do no better
                replica.state = State.UNHEALTHY
                _kill(replica, hung=True)
                try:
                    death = self._failures.actor_died(replica.name, error)
                except InfrastructureError as spent:
                    return self._fail(spent)
            except Exception as error:
                return self._fail(error)
        await self._changed.wait_for(lambda: replica.in_flight == 0)
        await self._close(replica, self._patience.health_timeout_s)
        del self._keepers[replica]
        return None

    async def _bring_up(self, replica: Replica, *, again: bool) -> None:
        """Raises what the actor's `setup` or the restoring raises, and LaunchError for a replacement that is late."""
        replica.state = State.STARTING
        replica.death = asyncio.get_running_loop().create_future()
        endpoint = replica.endpoint = self._spawn(replica.name)
        start_s = self._patience.start_s if again and not replica.optional else None
        try:
            async with asyncio.timeout(start_s):
                await endpoint.invoke("setup")
        except TimeoutError:
            raise LaunchError(f"{replica.name} not up after {start_s:g} s (cluster.start_timeout_s)") from None
        replica.state = State.STALE
        if again and self.restore is not None:
            await self.restore(endpoint)
        loaded = None
        while loaded is not self._latest:  # another may be published meanwhile
            loaded = self._latest
            assert loaded is not None
            await endpoint.invoke(loaded.method, loaded.args, loaded.kwargs)
        replica.state = State.HEALTHY
        self._changed.notify()

    async def _watch(self, replica: Replica) -> None:
        """Raises ActorDied as soon as the process is gone or does not answer; returns when it was stopped."""
        endpoint = replica.endpoint
        assert endpoint is not None
        ends = (
            self._changed.wait_for(lambda: replica.state is State.STOPPED),
            endpoint.until_death(),
            _raised(replica.death),
            self._ask(replica.name, endpoint),
        )
        watchers = [asyncio.ensure_future(end) for end in ends]
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            for watcher in done:
                watcher.result()
        finally:
            await _cancel(watchers)

    async def _ask(self, name: str, endpoint: Endpoint) -> NoReturn:
        """Whether a process still answers, time and again."""
        while True:
            await asyncio.sleep(self._patience.health_every_s)
            try:
                async with asyncio.timeout(self._patience.health_timeout_s):
                    await endpoint.ping()
            except TimeoutError:
                seconds = self._patience.health_timeout_s
                raise ActorDied(f"{name} did not answer for {seconds:g} s (recovery.health_timeout_s)") from None

    async def _close(self, replica: Replica, patience_s: float) -> None:
        """Let the process close; one that does not is logged. It is ended in any case."""
        try:
            if replica.endpoint is not None:
                async with asyncio.timeout(patience_s):
                    await replica.endpoint.invoke("close")
        except TimeoutError:
            log.warning("%s did not close within %g s", replica.name, patience_s)
        except Exception as error:  # nothing depends on it any more
            log.warning("%s did not close: %s", replica.name, error)
        finally:
            _kill(replica)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._changed.notify()


def make_service(spec: ActorSpec, spawn: Spawn, failures: Failures, config: RunConfig) -> Service:
    """The service that an actor's entry in the plan asks for."""
    recovery = config.recovery
    return Service(
        spec.name,
        spawn,
        spec.replicas,
        failures,
        Patience(config.cluster.start_timeout_s, recovery.health_every_s, recovery.health_timeout_s),
        optional_replicas=spec.optional_replicas,
        updates=frozenset(name for name in dir(spec.cls) if hasattr(getattr(spec.cls, name), "brings_up_to_date")),
    )


def _kill(replica: Replica, *, hung: bool = False) -> None:
    if replica.endpoint is not None:
        replica.endpoint.kill(hung=hung)


async def _raised(death: asyncio.Future[ActorDied]) -> NoReturn:
    raise await death


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
