"""How weights get from the trainer to the generators: through Ray's object store, or by a broadcast among processes."""

# MERGED: New weights on their way from the trainer into every generator, one version after another.

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Protocol, TypeVar

from grpo.config.schema import RunConfig
from grpo.errors import ActorDied, PayloadLost, TransferError
from grpo.services.handle import Services
from grpo.services.replica import LazyArg
from grpo.telemetry.activity import begin_activity, waiting_for
from grpo.telemetry.recording import measure
from grpo.types import GeneratorStats
from grpo.utils.aio import Interrupted, gather_or_cancel, race
from grpo.weights.broadcast import BroadcastGroup


def broadcast_backend(config: RunConfig) -> str:
    """Of torch.distributed, for weights on their way to the generators: `weight_sync.backend`, or which one `auto` is.

    NCCL has a GPU in one process of a group only, so none that is shared; vLLM's is that of processes of its own; and
    on one where ranks of the trainer talk over it at the same time, each may wait for the other.
    """
    if config.weight_sync.backend != "auto":
        return config.weight_sync.backend
    whole_gpus = config.trainer.num_gpus >= 1 and config.generator.num_gpus >= 1
    return "nccl" if whole_gpus and config.generator.engine == "torch" and config.trainer.ranks == 1 else "gloo"


_MOST_FAILURES = 3  # transfers in a row; then the object store is what is left


class Transport(Protocol):
    """`take` and `spread` are called by turns."""

    async def snapshot(self) -> None:
        """Copy the trainer's weights as they are."""

    async def broadcast(self) -> list[GeneratorStats]:
        """Bring what was taken into every generator; returns once all of them have acknowledged it."""

    def stored(self) -> LazyArg:
        """What was taken, in the object store, for others to load."""


def make_transport(services: Services, config: RunConfig, warn: Callable[[str], None]) -> Transport:
    """What `weight_sync.transport` names."""
    if config.weight_sync.transport == "object_store":
        return ObjectStore(services)
    return Collective(services, config, warn)


class ObjectStore:
    """Published once, fetched once by every node, mapped by every process there. Works on any cluster.

    Where they are lost with the trainer's node, before a generator has them, the new trainer's present ones are
    published, which are as new or newer.
    """

    def __init__(self, services: Services) -> None:
        self._trainer, self._generator = services.trainer, services.generator
        self._weights = LazyArg(self._published)

    async def snapshot(self) -> None:
        self._weights = LazyArg(self._published)  # lets go of those before: the store has room for two versions
        await self._weights.value()

    async def broadcast(self) -> list[GeneratorStats]:
        return await self._generator.update_weights.fanout(self._weights)

    def stored(self) -> LazyArg:
        return self._weights

    async def _published(self) -> Any:
        (weights, _), *_ = await self._trainer.push_weights.call()
        return weights


class Collective:
    """Broadcast from the trainer's buffer into a buffer of every generator.

    The group is the trainer and the generators that serve at the moment; another one meets when they are others. When
    a member leaves, or a transfer fails, this version goes through the object store, where newcomers and evaluators
    find theirs in any case: it is put there when the first of them asks.
    """

    def __init__(self, services: Services, config: RunConfig, warn: Callable[[str], None]) -> None:
        self._trainer, self._generator = services.trainer, services.generator
        self._settings, self._backend, self._warn = config.weight_sync, broadcast_backend(config), warn
        self._writing = asyncio.Lock()  # to the trainer's buffer, or having it put into the store
        self._header: Any = None
        self._weights = LazyArg(self._put)
        self._members: tuple[Sequence[Any], Sequence[Any]] = ((), ())  # the trainer's processes, and the generators
        self._group: BroadcastGroup | None = None
        self._numbers = count()
        self._failures = 0  # in a row

    async def snapshot(self) -> None:
        async with self._writing:
            self._header, *_ = await self._trainer.write_weights.call()
            self._weights = LazyArg(self._put)

    async def broadcast(self) -> list[GeneratorStats]:
        self._generator.update_weights.set_join_call(self._weights)
        if self._failures < _MOST_FAILURES:
            try:
                stats = await self._broadcast()
            except (ActorDied, TransferError) as error:
                await self._give_up(error)
            else:
                self._failures = 0
                return stats
        return await self._generator.update_weights.fanout(self._weights)

    def stored(self) -> LazyArg:
        return self._weights

    async def _put(self) -> Any:
        """A new trainer may have nothing to put there: then its present weights, which are as new or newer."""
        try:
            async with self._writing:
                (weights, version), *_ = await self._trainer.written_weights.call()
                if version is None:
                    (weights, _), *_ = await self._trainer.push_weights.call()
        except ActorDied as error:  # for good; who asks is not to be taken for dead
            raise PayloadLost(f"the weights went with the trainer: {error}") from error
        return weights

    async def _broadcast(self) -> list[GeneratorStats]:
        """Raises ActorDied when a member leaves, or there is none; TransferError."""
        group = await self._meeting()
        trainer, generators = self._members
        transfer = gather_or_cancel(
            self._trainer.send_weights.call(self._header, group),
            self._generator.receive_weights.fanout(self._header, group),
        )
        gone = self._trainer.wait_member_lost(trainer), self._generator.wait_member_lost(generators)
        _, stats = await race(transfer, *gone)
        return list(stats)

    async def _meeting(self) -> BroadcastGroup:
        """The group of those that serve; a new one where they are others than last time."""
        while self._group is None or self._serving() != self._members:
            self._members = trainer, generators = self._serving()
            if not (trainer and generators):
                raise ActorDied("nobody is there to send weights, or to receive them")
            host, port = await self._trainer.rendezvous()  # others may serve by then
            self._group = BroadcastGroup(
                next(self._numbers), host, port, len(generators), self._backend,
                int(self._settings.bucket_mb * 2**20), self._settings.timeout_s,
            )  # fmt: skip
        return self._group

    def _serving(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return tuple(self._trainer.processes()), tuple(self._generator.processes())

    async def _give_up(self, error: Exception) -> None:
        """Have all leave the group: what is late must not be loaded. The next transfer makes a new one."""
        if self._group is not None:
            number = self._group.number
            await gather_or_cancel(self._generator.leave_group.fanout(number), self._trainer.leave_group.call(number))
            self._group = None
        self._failures += isinstance(error, TransferError) and self._serving() == self._members
        measure("weights/transfers_failed", 1, "sum")
        ever = "" if self._failures < _MOST_FAILURES else f", and so do all others: {_MOST_FAILURES} failed in a row"
        self._warn(f"{error}; these weights go through the object store{ever}")


R = TypeVar("R")


class WeightSync:
    """The weights are copied between two train steps, and travel beside the next one.

    Tickets bound staleness: they come back when the weights are in use, however far the trainer is by then. It waits
    for the version before the one that it has, whose buffer is written to again. With `buffer.max_policy_age=0` it
    waits for every version: before, there is no batch to go on with.
    """

    def __init__(
        self, services: Services, config: RunConfig, warn: Callable[[str], None], tasks: asyncio.TaskGroup
    ) -> None:
        self._transport, self._tasks = make_transport(services, config, warn), tasks
        self._synchronous = config.buffer.max_policy_age == 0
        self._broadcasting: asyncio.Task[list[GeneratorStats]] | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def publish(self, *, wait: bool = False) -> None:
        """Copy the trainer's weights as they are, once the version before is in use, and send them on their way.

        With `wait`, or synchronously, returns when they are live.
        """
        await self.done()
        await self._transport.snapshot()
        self._broadcasting = self._tasks.create_task(_apart(self._transport.broadcast()), name="weights")
        if wait or self._synchronous:
            await self.wait_loaded()

    async def wait_loaded(self) -> list[GeneratorStats]:
        """Wait until every generator has acknowledged what was published."""
        assert self._broadcasting is not None
        with waiting_for("weights"):
            return await self._broadcasting

    def stored(self) -> LazyArg:
        """The weights that were published, for others to load."""
        return self._transport.stored()

    async def beside_next_step(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin `work`, which waits until they are live, and return; its errors end the run. If they are, do it now."""
        if self._broadcasting is not None and self._broadcasting.done():
            await work
            return
        self._finishing = self._tasks.create_task(_apart(_unless_interrupted(work)), name="step")

    async def done(self) -> None:
        """Wait until that is over."""
        if self._finishing is not None:
            with waiting_for("weights"):
                await asyncio.wait([self._finishing])
            self._finishing.result()


async def _unless_interrupted(work: Coroutine[Any, Any, None]) -> None:
    """A shutdown is no error: the training hears of it by itself."""
    with suppress(Interrupted):
        await work


async def _apart(work: Coroutine[Any, Any, R]) -> R:
    begin_activity("weights")
    return await work
