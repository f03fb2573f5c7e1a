"""Handles to actors and services, with the four verbs.

    await services.dataloader.sample.call_one(0, 16)           the one actor; the answer of its rank 0
    await services.trainer.train_step.call(batch)              every rank of every replica; a list
    await services.generator.generate.route(prompt, params)    the replica with the fewest calls under way
    await services.generator.update_weights.fanout(weights)    every healthy replica; a list

An exception in the actor is raised at the `await`, with its type. A call that a dying process did not answer is
repeated: by another replica, or by the replacement once it is restored. A call that it answered is not repeated: the
restore accounts for it. So no call is lost, and none takes effect twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from itertools import chain
from types import SimpleNamespace
from typing import Any, NoReturn

from grpo.errors import ActorDied, LeaseLost
from grpo.services.endpoint import Endpoint, Process
from grpo.services.replica import Call, Restore
from grpo.services.service import Service
from grpo.telemetry.activity import waiting_for
from grpo.utils.aio import gather_or_cancel


class ActorHandle:
    """An actor or a service, as its callers see it. Other attributes are methods: `handle.method.verb(...)`.

    Example:

        generator = services.generator
        completions, report = await generator.generate.route(prompt, params)
        generator.scale(3)
        print(generator.replica_stats()["generator-0"]["state"])
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    @property
    def name(self) -> str:
        return self.service.name

    def on_restart(self, restore: Restore) -> None:
        """Call `restore` with a NewReplica whenever a process replaces one that died, before it serves.

        An error of `restore` ends the run, unless it is the death of the new process.
        """
        self.service.context.restore = lambda endpoint: restore(NewReplica(endpoint))

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Process]:
        """Give the process of the healthy replica with the fewest calls under way, to be passed on to another actor.

        The block counts as one call. A LeaseLost that it raises counts as the death of the process.
        """
        with waiting_for(f"{self.name}.lease"):
            replica = await self.service.available()
        with replica.in_use(dead_after=LeaseLost) as endpoint:
            yield endpoint.processes()[0]

    def scale(self, replicas: int) -> None:
        self.service.scale(replicas)

    def replica_stats(self) -> dict[str, dict[str, Any]]:
        return self.service.replica_stats()

    def processes(self) -> Sequence[Process]:
        return self.service.processes()

    async def wait_member_lost(self, processes: Iterable[Any]) -> NoReturn:
        await self.service.wait_member_lost(list(processes))

    async def rendezvous(self) -> tuple[str, int]:
        """Return a host and a free port at which rank 0 of the one replica can wait for other processes."""
        (replica,) = self.service.replicas
        if replica.endpoint is None:
            raise ActorDied(f"{self.name} is not up")
        return await replica.endpoint.processes()[0].rendezvous()

    def __getattr__(self, method: str) -> BoundMethod:
        if method.startswith("_"):
            raise AttributeError(method)  # copy and pickle look for such names
        return BoundMethod(self, method)


class BoundMethod:
    """One method of a handle, with the four verbs."""

    def __init__(self, handle: ActorHandle, method: str) -> None:
        self._handle, self._method = handle, method

    async def call_one(self, *args: Any, **kwargs: Any) -> Any:
        """Call the one actor behind the handle. Raises TypeError for a service of several replicas."""
        replicas = self._handle.service.replicas
        if len(replicas) != 1:
            raise TypeError(f"{self._handle.name} has {len(replicas)} processes; use call or route")
        return await self.route(*args, **kwargs)

    async def route(self, *args: Any, **kwargs: Any) -> Any:
        """Call the healthy replica with the fewest calls under way."""
        service, call = self._handle.service, Call(self._method, args, kwargs)
        with waiting_for(f"{service.name}.{self._method}"):
            while True:
                replica = await service.available()
                with suppress(ActorDied):
                    answer, *_ = await replica.attempt(call)
                    return answer

    async def call(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call every rank of every replica; return the answers by replica and rank."""
        service, call = self._handle.service, Call(self._method, args, kwargs)
        with waiting_for(f"{service.name}.{self._method}"):
            answers = await gather_or_cancel(*(service.call_replica(replica, call) for replica in service.replicas))
            return list(chain.from_iterable(answers))

    async def fanout(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call every healthy replica; return the answers of those that stay alive."""
        with waiting_for(f"{self._handle.name}.{self._method}"):
            return await self._handle.service.fanout(Call(self._method, args, kwargs))

    def set_join_call(self, *args: Any) -> None:
        """Make this call on every process that joins from now on, without calling the present ones."""
        self._handle.service.set_join_call(Call(self._method, args))


class NewReplica:
    """A replacement that does not serve yet, for `on_restart`: `await replica.method.call_one(...)`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __getattr__(self, method: str) -> Any:
        async def call_one(*args: Any, **kwargs: Any) -> Any:
            answer, *_ = await self._endpoint.call(method, args, kwargs)
            return answer

        return SimpleNamespace(call_one=call_one)


@dataclass(frozen=True)
class Services:
    """Handles to all actors of a training run.

    Completions are scored by the reward, or by the environment that they are played in: one of the two exists. The
    reference exists when the loss has a KL term, the checkpointer when checkpoints are written or resumed from. The
    evaluator is a generator for evaluations only; a run without one evaluates with the generator.

    Example:

        async with launch(config, Failures(config.recovery)) as services:
            prompts = await services.dataloader.sample.call_one(0, 16)
    """

    dataloader: ActorHandle
    generator: ActorHandle
    replay_buffer: ActorHandle
    trainer: ActorHandle
    reward: ActorHandle | None = None
    environment: ActorHandle | None = None
    reference: ActorHandle | None = None
    evaluator: ActorHandle | None = None
    checkpointer: ActorHandle | None = None

    def replica_stats(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the statistics of every replica, by actor and by replica name."""
        return {name: handle.replica_stats() for name, handle in self._handles().items()}

    def processes(self) -> list[Process]:
        """Return the processes of all actors that are in service."""
        return [process for handle in self._handles().values() for process in handle.processes()]

    def _handles(self) -> dict[str, ActorHandle]:
        handles = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: handle for name, handle in handles.items() if handle is not None}


@dataclass(frozen=True)
class EvaluationServices:
    """Handles to the actors of an evaluation: held-out prompts, completions, rewards or environments."""

    dataloader: ActorHandle
    generator: ActorHandle
    reward: ActorHandle | None = None
    environment: ActorHandle | None = None
