"""One place of a service, taken by one process after another.

starting --setup--> stale --brought up to date--> healthy --died, or does not answer--> unhealthy --> starting ...
any of them --removed--> stopped
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

from grpo.errors import ActorDied, LaunchError, PayloadLost
from grpo.services.endpoint import Endpoint, Spawn
from grpo.services.failures import Death, Failures
from grpo.utils.aio import Signal, cancel_and_wait, timeout_as

Restore = Callable[[Any], Awaitable[None]]  # takes a Newcomer


class LazyArg:
    """An argument of a fanout, or for newcomers: fetched when it is needed, if ever, and anew when it was lost."""

    def __init__(self, fetch: Callable[[], Awaitable[Any]]) -> None:
        self._fetch, self._fetching = fetch, asyncio.Lock()
        self._value: Any = None

    async def value(self) -> Any:
        async with self._fetching:
            if self._value is None:
                self._value = await self._fetch()
        return self._value

    def forget(self, value: Any) -> None:
        """Fetch it anew the next time, unless that was done already."""
        if self._value is value:
            self._value = None


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

    async def fetched(self) -> Call:
        """With the arguments that were to be fetched on demand."""
        if not any(isinstance(arg, LazyArg) for arg in self.args):
            return self
        args = [await arg.value() if isinstance(arg, LazyArg) else arg for arg in self.args]
        return replace(self, args=tuple(args))

    def forget(self, fetched: Call) -> bool:
        """Whether there were arguments that can be fetched anew, and will be."""
        lost = [(arg, value) for arg, value in zip(self.args, fetched.args, strict=True) if isinstance(arg, LazyArg)]
        for arg, value in lost:
            arg.forget(value)
        return bool(lost)


@dataclass(frozen=True)
class Timeouts:
    """How long a process may take to be up, and how its health is asked for; in seconds."""

    start_s: float = 600.0
    health_interval_s: float = 10.0
    health_timeout_s: float = 60.0


class PreemptionState:
    """Who has no place in the cluster yet. Optional replicas step back while a required one is among them.

    Those that serve go on at first: there may be room beside them. They leave, one after another, while a required
    one has been without a place for so many seconds again. One for all services of a run. `changed` is notified of
    every change that anybody may wait for, there and here.
    """

    def __init__(self, patience_s: float = 10.0) -> None:
        self.changed = Signal()
        self.place_requested = False
        self._required, self._patience_s = 0, patience_s

    @property
    def pending_required(self) -> bool:
        return self._required > 0

    @contextmanager
    def required(self) -> Iterator[None]:
        self._required += 1
        self.changed.notify()
        try:
            yield
        finally:
            self._required -= 1
            self.changed.notify()

    async def wait_scheduled(self, endpoint: Endpoint) -> None:
        """Wait for a required process to have a place, and ask for one where it finds none."""
        placed = asyncio.ensure_future(endpoint.wait_scheduled())
        try:
            while not (await asyncio.wait({placed}, timeout=self._patience_s))[0]:
                self.place_requested = True
                self.changed.notify()
            placed.result()
        finally:
            self.place_requested = False
            await cancel_and_wait([placed])

    def should_yield(self) -> bool:
        """Whether an optional replica has to leave; true for one of those that ask."""
        asked, self.place_requested = self.place_requested, False
        return asked


@dataclass
class ServiceContext:
    """What the replicas of a service share.

    `latest` is the last call that a newcomer has to be given before it serves, `restore` does whatever else a
    replacement needs.
    """

    spawn: Spawn
    failures: Failures
    timeouts: Timeouts
    preemption: PreemptionState
    latest: Call | None = None
    restore: Callable[[Endpoint], Awaitable[None]] | None = None

    @property
    def changed(self) -> Signal:
        return self.preemption.changed


class Replica:
    """`live` keeps it alive. The figures count over all of its processes."""

    def __init__(self, name: str, context: ServiceContext, *, optional: bool = False) -> None:
        self.name = name
        self.optional = optional  # comes when the cluster has room for it
        self.state = State.STARTING
        self.in_flight = self.requests = self.failures = 0
        self.busy_s = 0.0  # sum over the requests
        self.endpoint: Endpoint | None = None
        self._context = context
        self._death: asyncio.Future[ActorDied] = asyncio.get_running_loop().create_future()

    async def attempt(self, call: Call) -> list[Any]:
        """The answers, by rank. Raises ActorDied when a process died. It is replaced: the call can be made again."""
        endpoint, death = self.endpoint, self._death
        assert endpoint is not None
        self.in_flight += 1
        self.requests += 1
        started = time.perf_counter()
        try:
            return await endpoint.call(call.method, call.args, call.kwargs)
        except ActorDied as error:
            self.failures += 1
            if self.endpoint is endpoint:  # else its replacement is there already
                self._become(State.UNHEALTHY)
                if not death.done():
                    death.set_result(error)
            raise
        finally:
            self.in_flight -= 1
            self.busy_s += time.perf_counter() - started
            if self.state is State.STOPPED:
                self._context.changed.notify()

    def stop(self) -> None:
        """It gets no more calls, finishes those it has, and leaves."""
        self._become(State.STOPPED)

    def stats(self) -> dict[str, Any]:
        """For people: state, requests, failures, calls under way, and the mean latency in seconds."""
        return {
            "state": str(self.state),
            "requests": self.requests,
            "failures": self.failures,
            "in_flight": self.in_flight,
            "latency_s": self.busy_s / self.requests if self.requests else None,
        }

    async def supervise(self) -> None:
        """One process after another, until it is stopped. Raises what no other process would mend."""
        death: Death | None = None
        while self.state is not State.STOPPED:
            try:
                if await self._start(again=death is not None):
                    await self._serve(death)
                    death = None
            except LaunchError as error:  # other replicas may serve meanwhile
                self._context.failures.warn(f"{error}; trying again")
                self.kill(hung=True)
            except ActorDied as error:
                if death is None and self.state is State.STARTING and not self.optional:
                    raise  # it has never been up: another process would do no better
                self._become(State.UNHEALTHY)
                self.kill(hung=True)
                death = self._context.failures.actor_died(self.name, error)
        await self.close(self._context.timeouts.health_timeout_s)

    async def close(self, patience_s: float) -> None:
        """Let the process close; one that does not is logged. It is ended in any case."""
        hung = False
        try:
            if self.endpoint is not None:
                async with asyncio.timeout(patience_s):
                    await self.endpoint.invoke("close")
        except TimeoutError:
            hung = True
            log.warning("%s did not close within %g s", self.name, patience_s)
        except Exception as error:  # nothing depends on it any more
            log.warning("%s did not close: %s", self.name, error)
        finally:
            self.kill(hung=hung)

    def kill(self, *, hung: bool = False) -> None:
        if self.endpoint is not None:
            self.endpoint.kill(hung=hung)

    async def _start(self, *, again: bool) -> bool:
        """Have a process set up; False when it was stopped, or stepped back, before.

        Raises what the actor's `setup` raises, ActorDied when the process dies of it, and LaunchError for a
        replacement that is late.
        """
        preemption, changed = self._context.preemption, self._context.changed
        if self.optional:
            await changed.wait_for(lambda: not preemption.pending_required or self.state is State.STOPPED)
        if self.state is State.STOPPED:
            return False
        self._become(State.STARTING)
        self._death = asyncio.get_running_loop().create_future()
        self.endpoint = self._context.spawn(self.name)
        start_s = self._context.timeouts.start_s if again and not self.optional else None
        late = LaunchError(f"{self.name} not up after {start_s} s (cluster.start_timeout_s)")
        setup = asyncio.ensure_future(self._set_up(self.endpoint))
        taken_back = asyncio.ensure_future(
            changed.wait_for(lambda: self.state is State.STOPPED or (self.optional and preemption.pending_required))
        )
        try:
            async with timeout_as(start_s, lambda: late):
                with nullcontext() if self.optional else preemption.required():
                    await asyncio.wait((setup, taken_back), return_when=asyncio.FIRST_COMPLETED)
            if setup.done():
                setup.result()
                return True
            self.kill(hung=True)
            self.endpoint = None
            return False
        finally:
            await cancel_and_wait((setup, taken_back))

    async def _set_up(self, endpoint: Endpoint) -> None:
        if not self.optional:
            await self._context.preemption.wait_scheduled(endpoint)
        await endpoint.invoke("setup")

    async def _serve(self, death: Death | None) -> None:
        """Bring the process up to date and watch over it; returns when it was stopped and has finished, or has left.

        Raises ActorDied as soon as it is gone or does not answer, and what the restoring raises.
        """
        endpoint = self.endpoint
        assert endpoint is not None
        stopped = asyncio.ensure_future(
            self._context.changed.wait_for(lambda: self.state is State.STOPPED and not self.in_flight)
        )
        preemption = self._context.preemption
        leaving = asyncio.ensure_future(
            self._context.changed.wait_for(
                lambda: self.optional and preemption.place_requested and preemption.should_yield()
            )
        )
        works = (
            self._bring_up_to_date(endpoint, death),
            endpoint.wait_dead(),
            _raised(self._death),
            self._ask(endpoint),
        )
        tasks = pending = {stopped, leaving, *map(asyncio.ensure_future, works)}
        try:
            while not (stopped.done() or leaving.done()):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for work in done:
                    work.result()
        finally:
            await cancel_and_wait(
                tasks
            )  # also those that failed at the same moment: one error is told, the others are heard
        if not leaving.cancelled() and self.state is not State.STOPPED:
            self._leave()

    def _leave(self) -> None:
        """Make room; its calls are made again by others, and it comes back when there is room for it."""
        log.info("%s leaves its place to one that is needed", self.name)
        self._become(State.STARTING)
        endpoint, self.endpoint = self.endpoint, None
        assert endpoint is not None
        endpoint.kill(hung=True)

    async def _bring_up_to_date(self, endpoint: Endpoint, death: Death | None) -> None:
        self._become(State.STALE)
        if death is not None and self._context.restore is not None:
            await self._context.restore(endpoint)
        loaded = None
        while loaded is not self._context.latest:  # another may be published meanwhile
            loaded = self._context.latest
            assert loaded is not None
            call = await loaded.fetched()
            try:
                await endpoint.invoke(call.method, call.args, call.kwargs)
            except PayloadLost as error:  # with its node, before there was a copy
                if not loaded.forget(call):
                    raise
                self._context.failures.warn(f"{error}; it is fetched anew")
                loaded = None
        self._become(State.HEALTHY)
        if death is not None:
            self._context.failures.actor_is_back(death)

    async def _ask(self, endpoint: Endpoint) -> NoReturn:
        """Whether a process still answers, time and again."""
        every_s, timeout_s = self._context.timeouts.health_interval_s, self._context.timeouts.health_timeout_s
        late = ActorDied(f"{self.name} did not answer for {timeout_s:g} s (recovery.health_timeout_s)")
        while True:
            await asyncio.sleep(every_s)
            async with timeout_as(timeout_s, lambda: late):
                await endpoint.ping()

    def _become(self, state: State) -> None:
        """Once stopped, it stays so."""
        if self.state is not State.STOPPED:
            self.state = state
            self._context.changed.notify()


async def _raised(death: asyncio.Future[ActorDied]) -> NoReturn:
    raise await death
