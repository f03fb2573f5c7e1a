"""Broadcast of weights from one process to many with torch.distributed: gloo between CPUs, NCCL between GPUs.

A group consists of the processes that are alive at the moment; when one is lost, a new group is formed. No wait is
unbounded: forming the group and every bucket have a time-out. Leaving a group returns at once, even if the thread that
talks to the other processes is still blocked.
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
from grpo.weights.payload import Weights, WeightsHeader, on_copy_stream

R = TypeVar("R")
_BUCKETS_IN_FLIGHT = 2  # the next bucket leaves while the last one arrives


@dataclass(frozen=True)
class BroadcastGroup:
    """One sender, whose store listens on `host` and `port`, and `receivers` receivers. `backend` is gloo or nccl.

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
    """An actor's membership in the current group. A call for another group leaves the current one.

    With NCCL every bucket passes through the GPU that the process sees. The weights end up in host memory, where they
    are checked and any engine can load them.

    Example:
        await sender.send(group, weights)                           # in the trainer
        weights = await receiver.receive(group, weights.header)     # in each generator, at the same time
    """

    def __init__(self) -> None:
        self._membership: _Membership | None = None
        self._left = -1  # the highest number of a group that was left; calls for it may arrive late

    async def send(self, group: BroadcastGroup, weights: Weights) -> None:
        """Send to all receivers; afterwards the buffer may be overwritten. Raises TransferError."""
        await self._join(group, sends=True).run(lambda member: member.send(weights))

    async def receive(self, group: BroadcastGroup, header: WeightsHeader) -> Weights:
        """Return the weights of a header; with NCCL, valid until the next call. Raises TransferError."""
        return await self._join(group, sends=False).run(lambda member: member.receive(header))

    def leave(self, number: int | None = None) -> None:
        """Leave the current group, or all groups up to `number`; their calls raise TransferError."""
        current = -1 if self._membership is None else self._membership.group.number
        self._left = max(self._left, current if number is None else number)
        if self._membership is not None and current <= self._left:
            self._membership.leave()
            self._membership = None

    def _join(self, group: BroadcastGroup, *, sends: bool) -> _Membership:
        if group.number <= self._left:
            raise TransferError("the group was left before")
        if self._membership is None or self._membership.group.number != group.number:
            self.leave()
            self._membership = _Membership(group, sends=sends)
        return self._membership


class _Membership:
    """A group member in a thread of its own, which is abandoned when the group is left: nothing can wake it.

    The thread ends with the time-out of its present wait, or sooner if the connection breaks.
    """

    def __init__(self, group: BroadcastGroup, *, sends: bool) -> None:
        self.group = group
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = ThreadPoolExecutor(1, "broadcast")
        self._member = self._thread.submit(_Member, group, sends=sends)

    async def run(self, work: Callable[[_Member], R]) -> R:
        try:  # forming the group has time-outs of its own, except in NCCL's last step
            member = await self._result(self._member, 2 * self.group.timeout_s)
            return await self._result(self._thread.submit(work, member), None)
        except (RuntimeError, OSError) as error:  # bases of torch's store and connection errors; name and route errors
            raise TransferError(f"weights were not transferred: {' '.join(str(error).split())[:200]}") from error

    async def _result(self, work: Future[R], timeout_s: float | None) -> R:
        """Await work of the thread. Raises TransferError when the group is left or the time is up."""
        task = asyncio.wrap_future(work)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the await may have ended by then
        await asyncio.wait((task, self._left), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._left.done():
            raise TransferError("the group was left during a transfer")
        if not task.done():
            raise TransferError(f"a group of {self.group.receivers + 1} did not form within {timeout_s:g} s")
        return task.result()

    def leave(self) -> None:
        self._left.set_result(None)
        if self._member.done() and not self._member.exception():
            Thread(target=self._member.result().abort, daemon=True).start()  # abort may wait for the GPU
        self._thread.shutdown(wait=False)


class _Member:
    """One process of a group. Every call blocks until the other processes make it too."""

    def __init__(self, group: BroadcastGroup, *, sends: bool) -> None:
        self._bucket, self._timeout = group.bucket_bytes, timedelta(seconds=group.timeout_s)
        self._device = torch.device("cuda:0" if group.backend == "nccl" else "cpu")
        self._pinned: NDArray[np.uint8] | None = None
        self._store = distributed.TCPStore(
            group.host, group.port, is_master=sends, timeout=self._timeout, wait_for_workers=False
        )
        self._rank = 0 if sends else self._store.add("receivers", 1)
        if self._rank > group.receivers:
            raise TransferError(f"a group of {group.receivers} receivers is complete; there is no room for one more")
        self._processes = (_nccl if group.backend == "nccl" else _gloo)(group, self._store, self._rank, self._timeout)
        self._broadcast(torch.zeros(1, dtype=torch.uint8))  # NCCL connects at the first broadcast

    def send(self, weights: Weights) -> None:
        self._broadcast(torch.from_numpy(weights.buffer))

    def receive(self, header: WeightsHeader) -> Weights:
        buffer = self._buffer_for(header)
        self._broadcast(torch.from_numpy(buffer))
        read_only = buffer.view()
        read_only.flags.writeable = False  # an engine may compute with this very memory
        return header.weights(read_only)

    def abort(self) -> None:
        """Abort pending NCCL operations; gloo has no such call."""
        self._processes.abort()

    def _buffer_for(self, header: WeightsHeader) -> NDArray[np.uint8]:
        """Allocate per version on a CPU, where a model may adopt the memory; on a GPU reuse one pinned buffer."""
        if self._device.type == "cpu":
            return buffer_for(header.specs)
        if self._pinned is None:
            self._pinned = buffer_for(header.specs, pinned=True)
        return self._pinned

    def _broadcast(self, flat: Tensor) -> None:
        """Broadcast uint8 [bytes] of host memory in buckets; receivers' memory is overwritten."""
        options = distributed.BroadcastOptions()
        options.rootRank, options.timeout = 0, self._timeout
        in_flight: deque[tuple[Any, Tensor, Tensor]] = deque()
        with on_copy_stream(self._device):
            for bucket in flat.split(self._bucket) if flat.numel() else ():
                local = self._on_device(bucket)
                in_flight.append((self._processes.broadcast([local], options), local, bucket))
                if len(in_flight) > _BUCKETS_IN_FLIGHT:
                    self._finish(*in_flight.popleft())
            while in_flight:
                self._finish(*in_flight.popleft())

    def _on_device(self, bucket: Tensor) -> Tensor:
        """Return the tensor that the backend reads or fills: the bucket itself, or room for it on the GPU."""
        if self._device.type == "cpu":
            return bucket
        if self._rank == 0:
            return bucket.to(self._device, non_blocking=True)
        return torch.empty_like(bucket, device=self._device)

    def _finish(self, work: Any, local: Tensor, bucket: Tensor) -> None:
        work.wait(self._timeout)
        if self._rank > 0 and local is not bucket:
            bucket.copy_(local, non_blocking=True)


def _gloo(group: BroadcastGroup, store: Any, rank: int, timeout: timedelta) -> Any:
    """Bind to the same network as `ranks.join`, but by address, which unlike an interface is unambiguous with IPv6."""
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
    """Make waits raise on a time-out; by default NCCL's watchdog would end the process."""
    torch.cuda.set_device(0)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    before = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = (
        "1"  # only the constructor reads it; the trainer has joined its ranks long before
    )
    try:
        return distributed.ProcessGroupNCCL(store, rank, group.receivers + 1, options)
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        else:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before
