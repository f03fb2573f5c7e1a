"""The four verbs.

    call_one   the one actor behind the handle
    call       every rank of an actor, and every replica of a service; results by rank
    route      one replica of a service, the one with the fewest calls under way
    fanout     every healthy replica of a service

A call that a dying process takes with it is made again: by another replica, or by its replacement once that is
restored. What was acknowledged before is the restorer's business, so no call is lost and none takes effect twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, NoReturn

from grpo.errors import ActorDied
from grpo.services.endpoint import Endpoint, Process
from grpo.services.replica import Call, Replica, Restore
from grpo.services.service import Service
from grpo.telemetry.activity import waiting_for
from grpo.utils.aio import gather_or_cancel


class ActorHandle:
    """An actor or a service. Attributes are its methods: `handle.method.verb(...)`."""

    def __init__(self, service: Service, *, sticky: bool = False) -> None:
        self.service = service
        self._sticky = sticky
        self._replica: Replica | None = None  # the one that a session keeps to

    @property
    def name(self) -> str:
        return self.service.name

    def on_restart(self, restore: Restore) -> None:
        """Have `restore` called with every replacement of a process that died, before that serves.

        It gets a handle of which only `call_one` works. What it raises ends the run, unless the newcomer died too.
        """
        self.service.context.restore = lambda endpoint: restore(NewReplica(endpoint))

    def replica_stats(self) -> dict[str, dict[str, Any]]:
        return self.service.replica_stats()

    def processes(self) -> Sequence[Process]:
        return self.service.processes()

    async def wait_member_lost(self, sources: Iterable[Any]) -> NoReturn:
        await self.service.wait_member_lost(list(sources))

    async def rendezvous(self) -> tuple[str, int]:
        (replica,) = self.service.replicas
        if replica.endpoint is None:
            raise ActorDied(f"{self.name} is not up")
        return await replica.endpoint.rendezvous()

    def scale(self, replicas: int) -> None:
        self.service.scale(replicas)

    def session(self) -> ActorHandle:
        """A handle whose routed calls all go to one replica, as long as that lives."""
        return ActorHandle(self.service, sticky=True)

    def __getattr__(self, method: str) -> BoundMethod:
        if method.startswith("_"):
            raise AttributeError(method)  # copy and pickle look for such names
        return BoundMethod(self, method)

    async def _route(self, call: Call) -> Any:
        while True:
            replica = await self.service.available(self._replica)
            if self._sticky:
                self._replica = replica
            with suppress(ActorDied):
                answer, *_ = await replica.attempt(call)
                return answer


class BoundMethod:
    """One method of a handle, callable by the four verbs."""

    def __init__(self, handle: ActorHandle, method: str) -> None:
        self._handle, self._method = handle, method

    async def call_one(self, *args: Any, **kwargs: Any) -> Any:
        replicas = self._handle.service.replicas
        if len(replicas) != 1:
            raise TypeError(f"{self._handle.name} has {len(replicas)} processes; use call or route")
        return await self.route(*args, **kwargs)

    async def route(self, *args: Any, **kwargs: Any) -> Any:
        with waiting_for(f"{self._handle.name}.{self._method}"):
            return await self._handle._route(Call(self._method, args, kwargs))

    async def call(self, *args: Any, **kwargs: Any) -> list[Any]:
        service, call = self._handle.service, Call(self._method, args, kwargs)
        with waiting_for(f"{self._handle.name}.{self._method}"):
            answers = await gather_or_cancel(*(service.call_replica(replica, call) for replica in service.replicas))
            return list(chain.from_iterable(answers))

    async def fanout(self, *args: Any, **kwargs: Any) -> list[Any]:
        with waiting_for(f"{self._handle.name}.{self._method}"):
            return await self._handle.service.fanout(Call(self._method, args, kwargs))

    def set_join_call(self, *args: Any) -> None:
        self._handle.service.set_join_call(Call(self._method, args))


class NewReplica:
    """A process that does not serve yet."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __getattr__(self, method: str) -> _NewReplicaMethod:
        return _NewReplicaMethod(self._endpoint, method)


class _NewReplicaMethod:
    def __init__(self, endpoint: Endpoint, method: str) -> None:
        self._endpoint, self._method = endpoint, method

    async def call_one(self, *args: Any, **kwargs: Any) -> Any:
        return await self._endpoint.invoke(self._method, args, kwargs)


@dataclass(frozen=True)
class Services:
    """The nouns of the picture.

    The reference exists only when the loss has a KL term. The evaluator is a generator that only evaluations use; a
    run without one borrows the training's. The checkpointer is there when checkpoints are written or resumed from.
    """

    dataloader: ActorHandle
    generator: ActorHandle
    reward: ActorHandle
    replay_buffer: ActorHandle
    trainer: ActorHandle
    reference: ActorHandle | None = None
    evaluator: ActorHandle | None = None
    checkpointer: ActorHandle | None = None

    def replica_stats(self) -> dict[str, dict[str, Any]]:
        """Those of every replica of every actor."""
        return {name: figures for replicas in self.replicas().values() for name, figures in replicas.items()}

    def replicas(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The same, by actor."""
        return {name: handle.replica_stats() for name, handle in self._handles().items()}

    def processes(self) -> Iterable[Any]:
        """The processes of all actors that answer at the moment."""
        return [source for handle in self._handles().values() for source in handle.processes()]

    def _handles(self) -> dict[str, ActorHandle]:
        handles = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: handle for name, handle in handles.items() if handle is not None}


@dataclass(frozen=True)
class EvaluationServices:
    """Who hands out held-out prompts, who answers them, and who scores the answers."""

    dataloader: ActorHandle
    generator: ActorHandle
    reward: ActorHandle
