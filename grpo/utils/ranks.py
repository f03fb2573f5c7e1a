"""The process group of a model that several processes train together, and the rows of a tensor that each of them holds.

Every rank makes the same calls in the same order. If a rank dies or falls behind, the calls of the others raise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from grpo.utils.network import address_towards, interface_of

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Number `rank`, counted from 0, of `size` processes.

    Example:
        ranks = Ranks(0, 2)
        join(ranks, ("10.0.0.1", 29500), "cuda:0", timeout_s=600)
        loss, tokens = ranks.all_reduce([loss, tokens])     # the same numbers on both ranks
        leave()
    """

    rank: int
    size: int

    @classmethod
    def alone(cls) -> Ranks:
        return cls(0, 1)

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, in float64 and equal on each rank."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks in their order. They are pickled: large ones should be numpy arrays."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


def join(ranks: Ranks, rendezvous: tuple[str, int], device: str, timeout_s: float) -> None:
    """Form the process group, before a learner of several ranks is made. Returns once all ranks have joined.

    `rendezvous` is a host name or address of rank 0's machine and a free port on it. `device` is where this rank
    computes: "cpu", or for example "cuda:0". No rank waits longer than `timeout_s` for the others, here or later: the
    call raises, or, when it waits inside NCCL, the process ends.

    gloo uses the network that leads to rank 0 unless GLOO_SOCKET_IFNAME is set. Its own default is the address of the
    machine's name, which on Debian is 127.0.1.1, an address that other machines can't reach.
    """
    host, port = rendezvous
    if (interface := interface_of(address_towards(host, port))) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # stays set for the subgroups of this group
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}",
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device(device) if on_gpu else None,
    )


def device() -> torch.device:
    """Return the device on which this rank computes, as given to `join`."""
    group = distributed.group.WORLD
    return (group and group.bound_device_id) or torch.device("cpu")


def leave() -> None:
    """Destroy the process group that `join` formed."""
    distributed.destroy_process_group()


@dataclass(frozen=True)
class ShardRange:
    """Rows [start, stop) of a tensor with `total` rows along its first dimension. A scalar has one row."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, shape: Sequence[int], ranks: Ranks) -> ShardRange:
        """Return the rows of a rank, cut as `torch.chunk` does: the last ranks may have fewer rows, or none."""
        total = shape[0] if shape else 1
        per_rank = -(-total // ranks.size)
        start = min(ranks.rank * per_rank, total)
        return cls(start, min(start + per_rank, total), total)

    @property
    def count(self) -> int:
        return self.stop - self.start

    def overlap(self, other: ShardRange) -> tuple[slice, slice]:
        """Return the rows that both ranges contain, as slices of this range and of `other`; they may be empty."""
        start = max(self.start, other.start)
        stop = max(start, min(self.stop, other.stop))
        return slice(start - self.start, stop - self.start), slice(start - other.start, stop - other.start)
