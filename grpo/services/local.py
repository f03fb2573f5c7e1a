"""Run all actors in this process, without a cluster: for tests, debuggers and notebooks."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from grpo.actors.specs import ActorSpec, actor_specs
from grpo.config.schema import RunConfig
from grpo.errors import ActorDied
from grpo.services.endpoint import Process, free_port
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle, Services
from grpo.services.replica import PreemptionState
from grpo.services.service import make_service
from grpo.telemetry.recording import Recording, TelemetryBatch, context_for
from grpo.utils.aio import gather_or_cancel

_CLOSE_TIMEOUT_S = 5.0


@asynccontextmanager
async def launch_local(
    config: RunConfig, failures: Failures, fakes: Mapping[str, Any] | None = None
) -> AsyncIterator[Services]:
    """Launch all actors of a run as objects of this process. The trainer has one rank, which computes the same.

    `fakes` replace actors by name; a fake that is a function is called once per replica.

    Example:

        async with launch_local(config, Failures(config.recovery), {"reward": FakeReward()}) as services:
            scores = await services.reward.score.route(prompt, completions)
    """
    config = replace(config, trainer=replace(config.trainer, ranks=1))
    preemption = PreemptionState()
    services = {
        spec.name: make_service(spec, partial(_spawn, spec, (fakes or {}).get(spec.name)), failures, config, preemption)
        for spec in actor_specs(config)
    }
    try:
        await gather_or_cancel(*(service.ready() for service in services.values()))
        yield Services(**{name: ActorHandle(service) for name, service in services.items()})
    finally:
        await asyncio.gather(*(service.close(_CLOSE_TIMEOUT_S) for service in services.values()))


def _spawn(spec: ActorSpec, fake: Any, name: str) -> LocalEndpoint:
    actor = spec.cls(**spec.kwargs) if fake is None else fake() if callable(fake) else fake
    return LocalEndpoint(actor, name)


class LocalEndpoint(Process):
    """An actor as an object of this process, which can be killed like a process.

    Payloads are copied: actors overwrite their buffers, and a process boundary would have separated them.
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
            # `kill` cancels the call, not its caller: for the caller that is the death of the actor.
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

    async def wait_scheduled(self) -> None:
        self._raise_if_dead()

    async def ping(self) -> None:
        self._raise_if_dead()
        if hasattr(self.actor, "ping"):
            await self.actor.ping()

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        self._raise_if_dead()
        return self._recording.drain(keep_recording=keep_recording)

    async def rendezvous(self) -> tuple[str, int]:
        self._raise_if_dead()
        return "127.0.0.1", free_port()

    async def wait_dead(self) -> NoReturn:
        await self._dead.wait()
        raise self._death()

    def kill(self, *, hung: bool = False) -> None:
        self._dead.set()
        for call in self._calls:
            call.cancel()
        if self._closing is None and hasattr(self.actor, "close"):
            self._closing = asyncio.ensure_future(self.actor.close())  # ends its threads, as the end of a process does

    def _raise_if_dead(self) -> None:
        if self._dead.is_set():
            raise self._death()

    def _death(self) -> ActorDied:
        return ActorDied(f"{self.name} died: it was killed")
