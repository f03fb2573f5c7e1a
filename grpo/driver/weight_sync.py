"""Weights from the trainer into every generator, one version after another.

A version travels through the object store (ObjectStore) or by a broadcast between the processes (Collective).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Protocol

from grpo.config.schema import RunConfig
from grpo.errors import ActorDied, PayloadLost, TransferError
from grpo.services.handle import Services
from grpo.services.replica import LazyArg
from grpo.telemetry.activity import begin_activity, waiting_for
from grpo.telemetry.recording import measure
from grpo.types import GeneratorStats
from grpo.utils.aio import Interrupted, gather_or_cancel, race
from grpo.weights.broadcast import BroadcastGroup

_MAX_FAILURES = 3  # failed transfers in a row, after which a Collective only uses the object store


class WeightSync:
    """Copies the weights between two train steps and transfers them during the next one.

    Staleness stays bounded however far the trainer gets, because tickets return only when the weights are loaded. A
    new version is copied only after the previous one is loaded, because both use the same buffer. With
    `buffer.max_policy_age=0` every `publish` waits: without the new weights no further batch can be complete.

    Example:
        await weights.publish()                             # copied; now on its way to the generators
        await weights.overlap_with_next_step(finish())      # `finish` calls `wait_loaded` first
        batch = ...                                         # the next step trains meanwhile
        await weights.publish()                             # waits for `finish`, then copies the next version
    """

    def __init__(
        self, services: Services, config: RunConfig, warn: Callable[[str], None], tasks: asyncio.TaskGroup
    ) -> None:
        self._transport, self._tasks = make_transport(services, config, warn), tasks
        self._synchronous = config.buffer.max_policy_age == 0
        self._broadcasting: asyncio.Task[list[GeneratorStats]] | None = None
        self._overlapped: asyncio.Task[None] | None = None

    async def publish(self, *, wait: bool = False) -> None:
        """Copy the trainer's current weights and start their transfer.

        The transfer task:
            Consumes: the copy.
            Waits for: every generator to load it.
            Unblocked by: generators acknowledging; a dead generator is replaced and loads the weights as it joins.
            Ends when: all have acknowledged, which `wait_loaded` returns.

        With `wait`, or in a synchronous run, return only then.
        """

        async def broadcast() -> list[GeneratorStats]:
            begin_activity("weights")
            return await self._transport.broadcast()

        await self.wait_overlapped()
        await self._transport.snapshot()
        self._broadcasting = self._tasks.create_task(broadcast(), name="weights")
        if wait or self._synchronous:
            await self.wait_loaded()

    async def wait_loaded(self) -> list[GeneratorStats]:
        """Wait until every generator has acknowledged the published weights; return their counters."""
        assert self._broadcasting is not None
        with waiting_for("weights"):
            return await self._broadcasting

    def stored(self) -> LazyArg:
        """Return the published weights as a lazy argument, for actors that are not among the generators."""
        return self._transport.stored()

    async def overlap_with_next_step(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which begins with `wait_loaded`, as a task beside the next train step; its errors end the run.

        If the weights are loaded already, await `work` at once.
        """

        async def overlapped() -> None:
            begin_activity("weights")
            with suppress(Interrupted):  # not an error here: training sees the shutdown itself
                await work

        if self._broadcasting is not None and self._broadcasting.done():
            await work
            return
        self._overlapped = self._tasks.create_task(overlapped(), name="step")

    async def wait_overlapped(self) -> None:
        """Wait until the overlapped work has finished; raise its error."""
        if self._overlapped is not None:
            with waiting_for("weights"):
                await asyncio.wait([self._overlapped])
            self._overlapped.result()


class Transport(Protocol):
    """Transfers one version at a time: `snapshot` and `broadcast` are called alternately.

    Example:
        await transport.snapshot()              # between two train steps
        stats = await transport.broadcast()     # during the next one; every generator holds the weights now
    """

    async def snapshot(self) -> None:
        """Copy the trainer's current weights."""

    async def broadcast(self) -> list[GeneratorStats]:
        """Load the snapshot into every generator; return when all have acknowledged it."""

    def stored(self) -> LazyArg:
        """Return the snapshot in the object store, for actors that are not among the generators."""


def make_transport(services: Services, config: RunConfig, warn: Callable[[str], None]) -> Transport:
    """Build the transport that `weight_sync.transport` names."""
    if config.weight_sync.transport == "object_store":
        return ObjectStore(services)
    return Collective(services, config, warn)


class ObjectStore:
    """Transport through Ray's object store: stored once, fetched once by each node, mapped by each process there.

    Works on any cluster. If the weights are lost with the trainer's node before a generator has loaded them, the
    replacement trainer publishes its current weights, which are at least as new.
    """

    def __init__(self, services: Services) -> None:
        self._trainer, self._generator = services.trainer, services.generator
        self._weights = LazyArg(self._put)

    async def snapshot(self) -> None:
        self._weights = LazyArg(self._put)  # drops the previous version first: the store has room for two
        await self._weights.value()

    async def broadcast(self) -> list[GeneratorStats]:
        return await self._generator.update_weights.fanout(self._weights)

    def stored(self) -> LazyArg:
        return self._weights

    async def _put(self) -> Any:
        (weights, _), *_ = await self._trainer.push_weights.call()
        return weights


def broadcast_backend(config: RunConfig) -> str:
    """Return the torch.distributed backend of a Collective: `weight_sync.backend`, or the choice behind "auto".

    NCCL requires a whole GPU for every process of the group. vLLM holds its GPU in subprocesses that are not members.
    If the ranks of a trainer used NCCL among themselves at the same time, the two groups could deadlock.
    """
    if config.weight_sync.backend != "auto":
        return config.weight_sync.backend
    whole_gpus = config.trainer.num_gpus >= 1 and config.generator.num_gpus >= 1
    return "nccl" if whole_gpus and config.generator.engine == "torch" and config.trainer.ranks == 1 else "gloo"


class Collective:
    """Transport by torch.distributed: broadcast from the trainer's buffer into a buffer of every generator.

    The group consists of the trainer and the healthy generators; it is formed again when these change. If a member
    dies or a transfer fails, this version travels through the object store. New replicas and evaluators always load
    from the object store, where the weights are put when one of them first asks.
    """

    def __init__(self, services: Services, config: RunConfig, warn: Callable[[str], None]) -> None:
        self._trainer, self._generator = services.trainer, services.generator
        self._settings, self._backend, self._warn = config.weight_sync, broadcast_backend(config), warn
        self._buffer_lock = asyncio.Lock()  # the trainer's buffer is either written or copied into the store
        self._header: Any = None
        self._weights = LazyArg(self._put)
        self._members: tuple[Sequence[Any], Sequence[Any]] = ((), ())  # processes of the trainer, of the generators
        self._group: BroadcastGroup | None = None
        self._group_numbers = count()
        self._failures = 0  # in a row

    async def snapshot(self) -> None:
        async with self._buffer_lock:
            self._header, *_ = await self._trainer.write_weights.call()
            self._weights = LazyArg(self._put)

    async def broadcast(self) -> list[GeneratorStats]:
        self._generator.update_weights.set_join_call(self._weights)
        if self._failures < _MAX_FAILURES:
            try:
                stats = await self._transfer()
            except (ActorDied, TransferError) as error:
                await self._abandon_group(error)
            else:
                self._failures = 0
                return stats
        return await self._generator.update_weights.fanout(self._weights)

    def stored(self) -> LazyArg:
        return self._weights

    async def _transfer(self) -> list[GeneratorStats]:
        """Send from the trainer and receive in the generators. Raises TransferError; ActorDied if a member is lost."""
        group = await self._current_group()
        trainer, generators = self._members
        transfer = gather_or_cancel(
            self._trainer.send_weights.call(self._header, group),
            self._generator.receive_weights.fanout(self._header, group),
        )
        # The members block in a collective: without these two they would wait for the dead one until the time-out.
        lost = self._trainer.wait_member_lost(trainer), self._generator.wait_member_lost(generators)
        _, stats = await race(transfer, *lost)
        return list(stats)

    async def _current_group(self) -> BroadcastGroup:
        """Reuse the group while membership is unchanged, else form a new one. Raises ActorDied without members."""
        while self._group is None or self._healthy() != self._members:
            self._members = trainer, generators = self._healthy()
            if not (trainer and generators):
                raise ActorDied("no healthy trainer or no healthy generator for a broadcast of weights")
            host, port = await self._trainer.rendezvous()  # membership may change meanwhile: check again
            self._group = BroadcastGroup(
                next(self._group_numbers), host, port, len(generators), self._backend,
                int(self._settings.bucket_mb * 2**20), self._settings.timeout_s,
            )  # fmt: skip
        return self._group

    def _healthy(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return tuple(self._trainer.processes()), tuple(self._generator.processes())

    async def _abandon_group(self, error: Exception) -> None:
        """Make all members leave the group, so that none loads late data. The next transfer forms a new one."""
        if self._group is not None:
            number = self._group.number
            await gather_or_cancel(self._generator.leave_group.fanout(number), self._trainer.leave_group.call(number))
            self._group = None
        # A failure counts only if no member was lost: a dead member says nothing about the network.
        self._failures += isinstance(error, TransferError) and self._healthy() == self._members
        measure("weights/transfers_failed", 1, "sum")
        always = f" from now on, after {_MAX_FAILURES} failures in a row" if self._failures == _MAX_FAILURES else ""
        self._warn(f"{error}; sending weights through the object store{always}")

    async def _put(self) -> Any:
        """Put the trainer's buffer into the object store; if a new trainer's is empty, put its current weights."""
        try:
            async with self._buffer_lock:
                (weights, version), *_ = await self._trainer.written_weights.call()
                if version is None:
                    (weights, _), *_ = await self._trainer.push_weights.call()
        except ActorDied as error:  # the caller is a generator or evaluator: it must not be taken for the dead one
            raise PayloadLost(f"the weights were lost with the trainer: {error}") from error
        return weights
