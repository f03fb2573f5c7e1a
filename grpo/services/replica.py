"""Supervise one replica of a service: start a process, sync it, check its health, replace it when it dies.

starting --setup--> stale --synced--> healthy --died, or does not answer--> unhealthy --> starting ...
any state --stop--> stopped
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NoReturn

from grpo.errors import ActorDied, LaunchError, LeaseLost, PayloadLost
from grpo.services.endpoint import Endpoint, Spawn
from grpo.services.failures import Death, Failures
from grpo.utils.aio import Signal, cancel_and_wait, timeout_as

log = logging.getLogger(__name__)
Restore = Callable[[Any], Awaitable[None]]  # takes a NewReplica


class State(StrEnum):
    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    STOPPED = "stopped"


class LazyArg:
    """An argument of a fanout that is fetched when a replica first needs it, and again when it was lost.

    Example:

        weights = LazyArg(publish)  # `publish` is an async function that returns a reference
        await services.generator.update_weights.fanout(weights)
        # A generator that joins later gets the same weights; `publish` is called again if they were lost.
    """

    def __init__(self, fetch: Callable[[], Awaitable[Any]]) -> None:
        self._fetch, self._fetching = fetch, asyncio.Lock()
        self._value: Any = None

    async def value(self) -> Any:
        async with self._fetching:
            if self._value is None:
                self._value = await self._fetch()
        return self._value

    def invalidate(self, value: Any) -> None:
        """Fetch again the next time, unless that value was replaced already."""
        if self._value is value:
            self._value = None


@dataclass(frozen=True)
class Call:
    """A method with its arguments."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    async def resolve(self) -> Call:
        """Return the call with the values of its lazy arguments."""
        if not any(isinstance(arg, LazyArg) for arg in self.args):
            return self
        args = [await arg.value() if isinstance(arg, LazyArg) else arg for arg in self.args]
        return replace(self, args=tuple(args))

    def invalidate(self, resolved: Call) -> bool:
        """Have the lazy arguments of a resolved call fetched again; False if there are none."""
        lazy = [(arg, value) for arg, value in zip(self.args, resolved.args, strict=True) if isinstance(arg, LazyArg)]
        for arg, value in lazy:
            arg.invalidate(value)
        return bool(lazy)


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a replacement may take to start, between two health checks, and for the answer to one."""

    start_s: float = 600.0
    health_interval_s: float = 10.0
    health_timeout_s: float = 60.0


class PreemptionState:
    """Required processes that have no room in the cluster yet, so that optional replicas make room for them.

    An optional replica that is starting steps back at once while a required process is pending. Optional replicas that
    serve stay at first, since there may be room beside them. One of them yields every time that a required process has
    been without room for `patience_s`.

    All services of a run share one. `changed` is notified of every change in a replica or service, and here.
    """

    def __init__(self, patience_s: float = 10.0) -> None:
        self.changed = Signal()
        self.pending_required = 0  # required processes that are not up
        self._yield_requested, self._patience_s = False, patience_s

    @contextmanager
    def pending(self) -> Iterator[None]:
        """Count a required process that is starting."""
        self.pending_required += 1
        self.changed.notify()
        try:
            yield
        finally:
            self.pending_required -= 1
            self.changed.notify()

    async def wait_scheduled(self, endpoint: Endpoint) -> None:
        """Wait until a required process runs on a node; request room from an optional replica while it does not."""
        scheduled = asyncio.ensure_future(endpoint.wait_scheduled())
        try:
            while not (await asyncio.wait({scheduled}, timeout=self._patience_s))[0]:
                self._yield_requested = True
                self.changed.notify()
            scheduled.result()
        finally:
            self._yield_requested = False
            await cancel_and_wait([scheduled])

    def accept_yield_request(self) -> bool:
        """Return True to the first caller after a request: that optional replica has to yield its room."""
        requested, self._yield_requested = self._yield_requested, False
        return requested


@dataclass
class ServiceContext:
    """State that the replicas of a service share.

    `join_call` is made on every new process before it serves. `restore` does whatever else a replacement needs.
    """

    spawn: Spawn
    failures: Failures
    timeouts: Timeouts
    preemption: PreemptionState
    join_call: Call | None = None
    restore: Callable[[Endpoint], Awaitable[None]] | None = None

    @property
    def changed(self) -> Signal:
        return self.preemption.changed


class Replica:
    """One replica, served by one process after another; the statistics cover all of them."""

    def __init__(self, name: str, context: ServiceContext, *, optional: bool = False) -> None:
        self.name = name
        self.optional = optional  # starts when the cluster has room for it
        self.state = State.STARTING
        self.in_flight = self.requests = self.failures = 0
        self.busy_s = 0.0  # sum over the requests
        self.endpoint: Endpoint | None = None
        self._context = context
        self._death: asyncio.Future[ActorDied] = asyncio.get_running_loop().create_future()

    @property
    def healthy(self) -> bool:
        return self.state is State.HEALTHY

    async def attempt(self, call: Call) -> list[Any]:
        """Return the answers by rank. Raises ActorDied when a process died: its replacement can be asked again."""
        with self.in_use() as endpoint:
            return await endpoint.call(call.method, call.args, call.kwargs)

    @contextmanager
    def in_use(self, dead_after: type[ActorDied | LeaseLost] = ActorDied) -> Iterator[Endpoint]:
        """Count the block as a call of the process. An error `dead_after` in the block means that it is dead.

        Raises ActorDied if it is not healthy.
        """
        if not self.healthy:  # it died after the caller had chosen it
            raise ActorDied(f"{self.name} is {self.state}")
        endpoint, death = self.endpoint, self._death
        assert endpoint is not None
        self.in_flight += 1
        self.requests += 1
        started = time.perf_counter()
        try:
            yield endpoint
        except dead_after as error:
            self.failures += 1
            if self.endpoint is endpoint:  # else its replacement is up already
                self._set_state(State.UNHEALTHY)
                if not death.done():
                    death.set_result(error if isinstance(error, ActorDied) else ActorDied(str(error)))
            raise
        finally:
            self.in_flight -= 1
            self.busy_s += time.perf_counter() - started
            if self.state is State.STOPPED:
                self._context.changed.notify()

    def stop(self) -> None:
        """Send no more calls, and end the process when it has finished its calls."""
        self._set_state(State.STOPPED)

    def stats(self) -> dict[str, Any]:
        """Return state, requests, failures, calls under way, and the mean latency in seconds."""
        return {
            "state": str(self.state),
            "requests": self.requests,
            "failures": self.failures,
            "in_flight": self.in_flight,
            "latency_s": self.busy_s / self.requests if self.requests else None,
        }

    async def supervise(self) -> None:
        """Keep a process running until the replica is stopped.

        Consumes: restarts, from the budget in `Failures`.
        Waits for: room in the cluster and `setup`; then for `stop`, a death, or a request to yield.
        Unblocked by: the process; `stop`; other replicas, through `PreemptionState`.
        Ends when: the replica is stopped and idle. Raises what no new process can fix: the errors of `setup` and of
        the restore, ActorDied when the budget is used up, or when a required replica dies before it was ever up.
        """
        death: Death | None = None
        while self.state is not State.STOPPED:
            try:
                if await self._start(replacing=death is not None):
                    await self._serve(death)
                    death = None
            except LaunchError as error:  # other replicas may serve meanwhile
                self._context.failures.warn(f"{error}; retrying")
                self.kill(hung=True)
            except ActorDied as error:
                if death is None and self.state is State.STARTING and not self.optional:
                    raise  # it has never been up: another process would do no better
                self._set_state(State.UNHEALTHY)
                self.kill(hung=True)
                death = self._context.failures.actor_died(self.name, error)
        await self.close(self._context.timeouts.health_timeout_s)

    async def close(self, patience_s: float) -> None:
        """Let the process close itself within `patience_s`, then kill it. Errors are logged."""
        hung = False
        try:
            if self.endpoint is not None:
                async with asyncio.timeout(patience_s):
                    await self.endpoint.call("close")
        except TimeoutError:
            hung = True
            log.warning("%s did not close within %g s; killing it", self.name, patience_s)
        except Exception as error:  # nothing depends on it any more
            log.warning("%s did not close: %s", self.name, error)
        finally:
            self.kill(hung=hung)

    def kill(self, *, hung: bool = False) -> None:
        if self.endpoint is not None:
            self.endpoint.kill(hung=hung)

    async def _start(self, *, replacing: bool) -> bool:
        """Start a process and set it up; return False when the replica was stopped or stepped back before.

        Raises what the actor's `setup` raises, ActorDied when the process dies meanwhile, and LaunchError for a
        replacement that is late.
        """
        preemption, changed = self._context.preemption, self._context.changed
        if self.optional:
            await changed.wait_for(lambda: not preemption.pending_required or self.state is State.STOPPED)
        if self.state is State.STOPPED:
            return False
        self._set_state(State.STARTING)
        self._death = asyncio.get_running_loop().create_future()
        self.endpoint = self._context.spawn(self.name)

        # The first start is limited by the launch as a whole, an optional replica waits for room without a limit.
        start_s = self._context.timeouts.start_s if replacing and not self.optional else None
        late = LaunchError(f"{self.name} not up after {start_s} s (cluster.start_timeout_s)")
        setup = asyncio.ensure_future(self._set_up(self.endpoint))
        withdrawn = asyncio.ensure_future(
            changed.wait_for(lambda: self.state is State.STOPPED or (self.optional and preemption.pending_required))
        )
        try:
            async with timeout_as(start_s, lambda: late):
                with nullcontext() if self.optional else preemption.pending():
                    await asyncio.wait((setup, withdrawn), return_when=asyncio.FIRST_COMPLETED)
            if setup.done():
                setup.result()
                return True
            self.kill(hung=True)
            self.endpoint = None
            return False
        finally:
            await cancel_and_wait((setup, withdrawn))

    async def _set_up(self, endpoint: Endpoint) -> None:
        if not self.optional:
            await self._context.preemption.wait_scheduled(endpoint)
        await endpoint.call("setup")

    async def _serve(self, death: Death | None) -> None:
        """Sync the process and watch over it. Returns when it was stopped and is idle, or has yielded its room.

        Raises ActorDied as soon as the process is dead or does not answer, and what the restore raises.
        """
        endpoint, changed, preemption = self.endpoint, self._context.changed, self._context.preemption
        assert endpoint is not None

        async def death_of_a_call() -> NoReturn:
            raise await self._death

        finished = asyncio.ensure_future(changed.wait_for(lambda: self.state is State.STOPPED and not self.in_flight))
        yielding = asyncio.ensure_future(changed.wait_for(lambda: self.optional and preemption.accept_yield_request()))
        work = self._sync(endpoint, death), endpoint.wait_dead(), death_of_a_call(), self._check_health(endpoint)
        tasks = pending = {finished, yielding, *map(asyncio.ensure_future, work)}
        try:
            while not (finished.done() or yielding.done()):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await cancel_and_wait(tasks)  # of several errors at the same moment, one is raised

        # Its calls are repeated by other replicas, and it starts again when the cluster has room.
        if not yielding.cancelled() and self.state is not State.STOPPED:
            log.info("%s yields its room in the cluster to a required process", self.name)
            self._set_state(State.STARTING)
            self.endpoint = None
            endpoint.kill(hung=True)

    async def _sync(self, endpoint: Endpoint, death: Death | None) -> None:
        """Restore a replacement, make the newest join call, and mark the replica healthy."""
        self._set_state(State.STALE)
        if death is not None and self._context.restore is not None:
            await self._context.restore(endpoint)
        synced: Call | None = None
        while synced is not self._context.join_call:  # a newer one may arrive meanwhile
            synced = self._context.join_call
            assert synced is not None
            call = await synced.resolve()
            try:
                await endpoint.call(call.method, call.args, call.kwargs)
            except PayloadLost as error:  # with its node, before there was a copy
                if not synced.invalidate(call):
                    raise
                self._context.failures.warn(f"{error}; fetching it again")
                synced = None
        self._set_state(State.HEALTHY)
        if death is not None:
            self._context.failures.actor_recovered(death)

    async def _check_health(self, endpoint: Endpoint) -> NoReturn:
        """Ping the process at regular intervals. Raises ActorDied when it does not answer in time."""
        interval_s, timeout_s = self._context.timeouts.health_interval_s, self._context.timeouts.health_timeout_s
        late = ActorDied(f"{self.name} did not answer for {timeout_s:g} s (recovery.health_timeout_s)")
        while True:
            await asyncio.sleep(interval_s)
            async with timeout_as(timeout_s, lambda: late):
                await endpoint.ping()

    def _set_state(self, state: State) -> None:
        if self.state is not State.STOPPED:  # which is final
            self.state = state
            self._context.changed.notify()
