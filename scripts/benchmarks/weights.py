"""Weights from one process into others: publishing and loading against a plain copy of the same bytes in memory."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.figures import Figure
from grpo.actors.marks import replayed_on_join, returns_payload
from grpo.actors.specs import ActorSpec
from grpo.cluster.connect import ray_cluster
from grpo.cluster.launch import launch_actors
from grpo.config.operation import ClusterConfig
from grpo.config.schema import RunConfig
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle
from grpo.utils.aio import gather_or_cancel
from grpo.weights.broadcast import Broadcaster, BroadcastGroup
from grpo.weights.payload import StagedWeights, Weights, WeightsHeader, WeightsWriter, check_intact

_WIDTH = 1024
_COPIED = 2**28  # bytes, much more than the caches hold
_BROADCAST = 2**29  # bytes, at most
_GIB = 2**30
_MAY_GROW = 0.1  # of the weights' bytes: what else goes on on the machine is part of it


class Layers(nn.Module):
    """Square matrices of so many bytes in all, of ones: torch's zeros take up no memory until they are written to."""

    def __init__(self, nbytes: int, dtype: torch.dtype) -> None:
        super().__init__()
        count = nbytes // (_WIDTH * _WIDTH * dtype.itemsize)
        self.layers = nn.ParameterList(torch.ones(_WIDTH, _WIDTH, dtype=dtype) for _ in range(count))


class Publisher:
    """Holds a model in float32, as the trainer does, and publishes it in `dtype`, on every core."""

    def __init__(self, nbytes: int, dtype: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray had left it one
        self._dtype = getattr(torch, dtype)
        self._model = Layers(nbytes * 4 // self._dtype.itemsize, torch.float32)
        self._writer, self._version = WeightsWriter(self._model, self._dtype), 0
        self._written, self._broadcaster = self._writer.write(0), Broadcaster()
        self._source, self._target = np.full(_COPIED, 1, dtype=np.uint8), np.full(_COPIED, 2, dtype=np.uint8)

    async def setup(self) -> None: ...

    async def close(self) -> None: ...

    async def memcpy_s(self, nbytes: int) -> float:
        """A copy of as many bytes, by one thread, between pages that are there."""
        return _timed(lambda: np.copyto(self._target, self._source)) * nbytes / _COPIED

    @returns_payload
    async def push_weights(self) -> tuple[Weights, int]:
        await self.write_weights()
        return self._written, self._version

    async def write_weights(self) -> WeightsHeader:
        self._version += 1
        self._written = self._writer.write(self._version)
        return self._written.header

    async def send_weights(self, group: BroadcastGroup) -> None:
        await self._broadcaster.send(group, self._written)


class Receiver:
    """Holds a model in `dtype`, as a generator does."""

    def __init__(self, nbytes: int, dtype: str) -> None:
        torch.set_num_threads(1)
        self._model, self._broadcaster = Layers(nbytes, getattr(torch, dtype)), Broadcaster()

    async def setup(self) -> None: ...

    async def close(self) -> None: ...

    @replayed_on_join
    async def update_weights(self, weights: Weights) -> float:
        """Seconds in which nothing could be generated."""
        await asyncio.to_thread(check_intact, weights)
        return _timed((await asyncio.to_thread(StagedWeights, self._model, weights)).swap)

    async def receive_weights(self, header: WeightsHeader, group: BroadcastGroup) -> float:
        return await self.update_weights(await self._broadcaster.receive(group, header))


def run(quick: bool) -> list[Figure]:
    cases = [(_GIB // 2, "float32"), (_GIB // 2, "bfloat16")] + ([] if quick else [(2 * _GIB, "bfloat16")])
    updates, broadcasts = (5, 0) if quick else (50, 5)
    figures = []
    with ray_cluster(ClusterConfig()):
        for nbytes, dtype in cases:
            # Every replica has a copy of its own of what is broadcast, or two.
            sent = broadcasts if nbytes <= _BROADCAST else 0
            measured = asyncio.run(_measure(nbytes, dtype, updates, sent))
            figures += _figures(f"{nbytes / _GIB:g} GiB, {dtype}", measured, nbytes)
    return figures


def _figures(what: str, measured: dict[int, dict[str, float]], nbytes: int) -> list[Figure]:
    one, four = measured[1], measured[4]
    four_over_one = four["total_s"] / one["total_s"]
    rounds = 4 / min(4, len(os.sched_getaffinity(0)))  # replicas that a core loads one after another
    return [
        Figure("weights", f"{what}: a copy in memory", nbytes / one["memcpy_s"] / 1e9, "GB/s"),
        Figure("weights", f"{what}: publish and load, in copies", one["total_s"] / one["memcpy_s"], at_most=3.0),
        Figure("weights", f"{what}: pause, in copies", one["pause_s"] / one["memcpy_s"], at_most=1.3),
        Figure("weights", f"{what}: four replicas over one, per core", four_over_one / rounds, at_most=1.5),
        Figure("weights", f"{what}: growth of memory, four replicas", four["growth"], at_most=_MAY_GROW),
        *(
            Figure("weights", f"{what}: by broadcast to {name}, in copies", found["broadcast_s"] / found["memcpy_s"])
            for name, found in (("one", one), ("four", four))
            if "broadcast_s" in found
        ),
    ]


async def _measure(nbytes: int, dtype: str, updates: int, broadcasts: int) -> dict[int, dict[str, float]]:
    """With one replica, and then with four."""
    config, kwargs = RunConfig(), {"nbytes": nbytes, "dtype": dtype}
    specs = [ActorSpec("publisher", Publisher, kwargs)]
    specs += [ActorSpec(f"{n} receivers", Receiver, kwargs, n) for n in (1, 4)]
    async with launch_actors(specs, config, Failures(config.recovery)) as handles:
        publisher, found = handles["publisher"], {}
        for n in (1, 4):
            found[n] = await _updates(publisher, handles[f"{n} receivers"], nbytes, updates)
            if broadcasts:
                found[n]["broadcast_s"] = await _broadcasts(publisher, handles[f"{n} receivers"], n, broadcasts)
    return found


async def _updates(publisher: ActorHandle, receivers: ActorHandle, nbytes: int, updates: int) -> dict[str, float]:
    memcpys_s, totals_s, pauses_s, used = [], [], [], []
    for _ in range(updates + 2):
        began = time.perf_counter()
        (weights, _), *_ = await publisher.push_weights.call()
        pauses_s.append(max(await receivers.update_weights.fanout(weights)))
        totals_s.append(time.perf_counter() - began)
        memcpys_s.append(await publisher.memcpy_s.call_one(nbytes))
        del weights
        used.append(_used_bytes())
    return {
        "memcpy_s": median(memcpys_s[2:]),
        "total_s": median(totals_s[2:]),  # pages are touched for the first time in the first ones
        "pause_s": median(pauses_s[2:]),
        "growth": (median(used[-3:]) - median(used[2:5])) / nbytes,
    }


async def _broadcasts(publisher: ActorHandle, receivers: ActorHandle, replicas: int, count: int) -> float:
    host, port = await publisher.rendezvous()
    bucket_bytes = int(RunConfig().weight_sync.bucket_mb * 2**20)
    group = BroadcastGroup(replicas, host, port, replicas, "gloo", bucket_bytes, 600.0)
    took_s = []
    for _ in range(count + 1):
        began = time.perf_counter()
        header = await publisher.write_weights.call_one()
        await gather_or_cancel(publisher.send_weights.call(group), receivers.receive_weights.fanout(header, group))
        took_s.append(time.perf_counter() - began)
    return median(took_s[1:])  # the group meets in the first one


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _used_bytes() -> int:
    """Of the whole machine, caches left out."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return (kilobytes["MemTotal"] - kilobytes["MemAvailable"]) * 1024
