"""Weights from one process into many at once: a broadcast of torch.distributed, gloo between CPUs, NCCL between GPUs.

A group is made of the processes that live at the moment, and of others when one of them has gone. Nobody waits for ever
for a process that has: to meet, and every bucket, has a time-out, and who leaves the group is free at once, whatever
the thread that talks to the others is still waiting for.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from grpo.errors import TransferError
from grpo.utils.network import address_towards
from grpo.weights.flat_buffer import buffer_for
from grpo.weights.payload import Weights, WeightsHeader, copying_beside

R = TypeVar("R")
_AHEAD = 2  # buckets under way: the next one leaves while the last one arrives


@dataclass(frozen=True)
class BroadcastGroup:
    """One sender, who waits for the others at `host` and `port`, and so many receivers. `backend` is gloo or nccl.

    Later groups of a run have higher numbers.
    """

    number: int
    host: str
    port: int
    receivers: int
    backend: str
    bucket_bytes: int
    timeout_s: float


class Broadcaster:
    """An actor's place in the group of the moment. Calls of other groups leave the one before.

    With NCCL a bucket passes through the GPU that the process sees; in the end all is in the host's memory, where it
    is checked, and from where any engine loads it.
    """

    def __init__(self) -> None:
        self._place: _Place | None = None
        self._left = -1  # the number of the last group that was left; calls may arrive late

    async def send(self, group: BroadcastGroup, weights: Weights) -> None:
        """Returns when their buffer may be written to again. Raises TransferError."""
        await self._in(group, sends=True).run(lambda member: member.send(weights))

    async def receive(self, group: BroadcastGroup, header: WeightsHeader) -> Weights:
        """The weights behind a header; with NCCL, good until the next call. Raises TransferError."""
        return await self._in(group, sends=False).run(lambda member: member.receive(header))

    def leave(self, number: int | None = None) -> None:
        """Leave the group of the moment, or all up to a number; their calls raise TransferError."""
        present = -1 if self._place is None else self._place.group.number
        self._left = max(self._left, present if number is None else number)
        if self._place is not None and present <= self._left:
            self._place.leave()
            self._place = None

    def _in(self, group: BroadcastGroup, *, sends: bool) -> _Place:
        if group.number <= self._left:
            raise TransferError("the group was left before")
        if self._place is None or self._place.group.number != group.number:
            self.leave()
            self._place = _Place(group, sends=sends)
        return self._place


class _Place:
    """A member of a group, in a thread that is left to itself when the group is left, since nothing can wake it.

    It ends by the time-out of what it waits for, and sooner where the connection breaks.
    """

    def __init__(self, group: BroadcastGroup, *, sends: bool) -> None:
        self.group = group
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = ThreadPoolExecutor(1, "broadcast")
        self._member = self._thread.submit(_Member, group, sends=sends)

    async def run(self, work: Callable[[_Member], R]) -> R:
        try:  # the steps of meeting have time-outs of their own, but for NCCL's last one
            member = await self._unless_left(self._member, 2 * self.group.timeout_s)
            return await self._unless_left(self._thread.submit(work, member), None)
        except (RuntimeError, OSError) as error:  # the root of torch's errors of stores and connections; names, routes
            raise TransferError(f"weights were not transferred: {' '.join(str(error).split())[:200]}") from error

    async def _unless_left(self, work: Future[R], timeout_s: float | None) -> R:
        done = asyncio.wrap_future(work)
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits by then
        await asyncio.wait((done, self._left), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._left.done():
            raise TransferError("the group was left while weights were on their way")
        if not done.done():
            raise TransferError(f"a group of {self.group.receivers + 1} did not meet within {timeout_s:g} s")
        return done.result()

    def leave(self) -> None:
        self._left.set_result(None)
        if self._member.done() and not self._member.exception():
            Thread(target=self._member.result().abort, daemon=True).start()  # it may wait for the GPU
        self._thread.shutdown(wait=False)


class _Member:
    """One process of a group. Made, and used, in one thread: each call waits for the others."""

    def __init__(self, group: BroadcastGroup, *, sends: bool) -> None:
        self._bucket, self._timeout = group.bucket_bytes, timedelta(seconds=group.timeout_s)
        self._device = torch.device("cuda:0" if group.backend == "nccl" else "cpu")
        self._pinned: NDArray[np.uint8] | None = None
        self._store = distributed.TCPStore(
            group.host, group.port, is_master=sends, timeout=self._timeout, wait_for_workers=False
        )
        self._rank = 0 if sends else self._store.add("receivers", 1)
        if self._rank > group.receivers:
            raise TransferError(f"a group of {group.receivers} receivers has no room for one more")
        self._processes = (_nccl if group.backend == "nccl" else _gloo)(group, self._store, self._rank, self._timeout)
        self._broadcast(torch.zeros(1, dtype=torch.uint8))  # NCCL's connect with the first one

    def send(self, weights: Weights) -> None:
        self._broadcast(torch.from_numpy(weights.buffer))

    def receive(self, header: WeightsHeader) -> Weights:
        buffer = self._buffer_for(header)
        self._broadcast(torch.from_numpy(buffer))
        arrived = buffer.view()
        arrived.flags.writeable = False  # an engine may compute with this very memory
        return header.weights(arrived)

    def abort(self) -> None:
        """Wake what waits in NCCL; gloo has no such call."""
        self._processes.abort()

    def _buffer_for(self, header: WeightsHeader) -> NDArray[np.uint8]:
        """One of its own for every version, where that may become a model's memory; pinned memory is for passing on."""
        if self._device.type == "cpu":
            return buffer_for(header.specs)
        if self._pinned is None:
            self._pinned = buffer_for(header.specs, pinned=True)
        return self._pinned

    def _broadcast(self, flat: Tensor) -> None:
        """Fill uint8 [bytes] of host memory with the sender's, in buckets."""
        options = distributed.BroadcastOptions()
        options.rootRank, options.timeout = 0, self._timeout
        under_way: deque[tuple[Any, Tensor, Tensor]] = deque()
        with copying_beside(self._device):
            for bucket in flat.split(self._bucket) if flat.numel() else ():
                here = self._within_reach(bucket)
                under_way.append((self._processes.broadcast([here], options), here, bucket))
                if len(under_way) > _AHEAD:
                    self._finish(*under_way.popleft())
            while under_way:
                self._finish(*under_way.popleft())

    def _within_reach(self, bucket: Tensor) -> Tensor:
        """Where the backend takes it from, or puts it: the bucket itself, or room for it on the GPU."""
        if self._device.type == "cpu":
            return bucket
        return (
            bucket.to(self._device, non_blocking=True)
            if self._rank == 0
            else torch.empty_like(bucket, device=self._device)
        )

    def _finish(self, work: Any, here: Tensor, bucket: Tensor) -> None:
        work.wait(self._timeout)
        if self._rank > 0 and here is not bucket:
            bucket.copy_(here, non_blocking=True)


def _gloo(group: BroadcastGroup, store: Any, rank: int, timeout: timedelta) -> Any:
    """Bound as the ranks' is, see `ranks.join`; by an address, which for IPv6 says more than an interface does."""
    gloo: Any = distributed.ProcessGroupGloo  # its stubs know no options
    options = gloo._Options()
    options._timeout = timeout
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    options._devices = (
        [gloo.create_device(interface=name) for name in names.split(",")]
        if names
        else [gloo.create_device(hostname=address_towards(group.host, group.port))]
    )
    return gloo(store, rank, group.receivers + 1, options)


def _nccl(group: BroadcastGroup, store: Any, rank: int, timeout: timedelta) -> Any:
    """With waits that raise, where NCCL's watchdog would end the process."""
    torch.cuda.set_device(0)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    before = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # is read here and now; ranks of a trainer have met long before
    try:
        return distributed.ProcessGroupNCCL(store, rank, group.receivers + 1, options)
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        else:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before
