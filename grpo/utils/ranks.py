"""The processes that train one model together, each on its share of a batch, and what they tell each other.

Every rank makes the same calls in the same order; a rank that dies or falls behind makes the others raise.
"""

# MERGED: How tensors are cut between ranks: along their first dimension, as `torch.chunk` cuts.

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
    """This process is number `rank` of `size`, counted from 0."""

    rank: int
    size: int

    @classmethod
    def alone(cls) -> Ranks:
        return cls(0, 1)

    def added_up(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in float64 and the same on each."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def from_all(self, value: T) -> list[T]:
        """What each rank gave, in their order. It is pickled, so what is large should be numpy arrays."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


def join(ranks: Ranks, rendezvous: tuple[str, int], device: str, timeout_s: float) -> None:
    """Meet the other ranks, before a learner of several is made. Returns when all are there.

    `rendezvous` is a host name or address of rank 0's machine and a free port there; `device` is where this rank
    computes, "cpu" or as "cuda:0". No rank waits longer than `timeout_s` for the others, here or later: then it
    raises, or, where it waits inside NCCL, its process ends.

    gloo takes the network that leads to rank 0, where GLOO_SOCKET_IFNAME names no other: by itself it takes the address
    of this machine's name, which with Debian is 127.0.1.1, where nobody else finds it.
    """
    host, port = rendezvous
    if (interface := interface_of(address_towards(host, port))) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # stays, for groups that are made of this one
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
    """Where this rank computes, as `join` was told."""
    group = distributed.group.WORLD
    return (group and group.bound_device_id) or torch.device("cpu")


def leave() -> None:
    """End what `join` began."""
    distributed.destroy_process_group()


@dataclass(frozen=True)
class ShardRange:
    """Rows [start, stop) of the `total` that a tensor has along its first dimension. A scalar has one."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, shape: Sequence[int], ranks: Ranks) -> ShardRange:
        """Those of a rank. The last ranks may have fewer than the others, or none."""
        total = shape[0] if shape else 1
        each = -(-total // ranks.size)
        start = min(ranks.rank * each, total)
        return cls(start, min(start + each, total), total)

    @property
    def count(self) -> int:
        return self.stop - self.start

    def shared_with(self, other: ShardRange) -> tuple[slice, slice]:
        """Where the rows that both have lie in this part, and where in the other. The slices may be empty."""
        start = max(self.start, other.start)
        stop = max(start, min(self.stop, other.stop))
        return slice(start - self.start, stop - self.start), slice(start - other.start, stop - other.start)
