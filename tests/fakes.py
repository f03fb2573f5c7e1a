"""Actors that the tests put in place of real ones."""

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from grpo.actors.marks import batched, returns_payload
from grpo.algorithms.losses import GRPO, LossInputs, PerTokenLoss
from grpo.config.operation import RecoveryConfig
from grpo.errors import RewardError
from grpo.services.failures import Failures
from grpo.services.local import LocalEndpoint
from grpo.services.replica import PreemptionState, Replica, ServiceContext, State, Timeouts
from grpo.services.service import Service
from grpo.types import Batch, GenerationReport, GeneratorStats, SamplingParams, Scores
from grpo.utils.aio import Signal
from grpo.weights.flat_buffer import buffer_checksum
from grpo.weights.payload import Weights


def service_of(*endpoints, name="actor"):
    """A service of processes that are there already; they serve at once and are never replaced."""
    service = Service(name, ServiceContext(None, Failures(RecoveryConfig()), Timeouts(), PreemptionState()), 0)
    for i, endpoint in enumerate(endpoints):
        replica = Replica(f"{name}-{i}", service.context)
        replica.endpoint, replica.state = endpoint, State.HEALTHY
        service._supervisors[replica] = None
    return service


EVALUATION_SEEDS = 1 << 60  # those of held-out prompts lie above it


class CountingTrainer:
    """A trainer that only counts versions and remembers what it was given."""

    def __init__(self) -> None:
        self.version = 0
        self.batches: list[Batch] = []
        self.ages: list[int] = []
        self._stepped = Signal()

    async def until(self, version: int) -> None:
        await self._stepped.wait_for(lambda: self.version >= version)

    async def train_step(self, batch: Batch) -> dict[str, float]:
        self.batches.append(batch)
        ages = [self.version - group.oldest_version for group in batch.groups]
        self.ages += ages
        self.version += 1
        self._stepped.notify()
        return {"loss": 0.0, "policy_age/max": float(max(ages)), "policy_age/mean": sum(ages) / len(ages)}

    async def push_weights(self) -> tuple[Weights, int]:
        empty = np.zeros(0, dtype=np.uint8)
        return Weights(self.version, (), empty, buffer_checksum(empty)), self.version

    async def snapshot(self) -> tuple[int, int]:
        return self.version, self.version

    async def restore(self, states: Sequence[int]) -> None:
        (self.version,) = states


class GatedGenerator:
    """Wraps a generator; loading new weights waits until the test opens the gate."""

    def __init__(self, generator, gate) -> None:
        self._generator, self._gate = generator, gate
        self.generate = generator.generate
        self.asked = asyncio.Event()

    async def update_weights(self, weights: Weights) -> GeneratorStats:
        if weights.version > 0:
            self.asked.set()
            await self._gate.wait()
        return await self._generator.update_weights(weights)


class OverwritingTrainer(CountingTrainer):
    """Publishes all versions through one buffer, as the real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = np.zeros(1, dtype=np.uint8)

    async def push_weights(self) -> tuple[Weights, int]:
        self.buffer[0] = self.version
        return Weights(self.version, (), self.buffer), self.version


class GatedAnswers:
    """Stands before generators: held-out prompts are answered once the test opens the gate; trainings' pass at once.

    `asked` says that somebody stood before the closed gate. Remembers the version and parameters of every answer, and
    what was loaded. May answer with an error, or report a newest version that is not there.
    """

    def __init__(self, error=None, report_version=None) -> None:
        self._open, self.asked = asyncio.Event(), asyncio.Event()
        self._error, self._report_version = error, report_version
        self.answered: list[tuple[int, SamplingParams]] = []
        self.loaded: list[tuple[int, int]] = []  # version, and what its buffer held once it was loaded
        self.open, self.close = self._open.set, self._open.clear

    def guard(self, handle) -> None:
        for replica in handle.service.replicas:
            replica.endpoint = LocalEndpoint(_Guarded(self, replica.endpoint.actor))

    async def generate(self, generator, prompt, params):
        if params.seed < EVALUATION_SEEDS:
            return await generator.generate(prompt, params)
        if not self._open.is_set():
            self.asked.set()
        await self._open.wait()
        if self._error:
            raise self._error
        completions, report = await generator.generate(prompt, params)
        self.answered.append((report.oldest_version, params))
        if self._report_version is not None:
            report = replace(report, newest_version=self._report_version)
        return completions, report

    async def update_weights(self, generator, weights):
        stats = await generator.update_weights(weights)
        if weights.buffer.size:
            self.loaded.append((weights.version, int(weights.buffer[0])))
        return stats


class _Guarded:
    def __init__(self, gate, generator) -> None:
        self.generate = partial(gate.generate, generator)
        self.update_weights = partial(gate.update_weights, generator)


class AnswersOf:
    """A generator whose groups have these lengths; the places in `cut` were cut off. The answers are their places."""

    def __init__(self, lengths, cut=()) -> None:
        truncated = tuple(i in cut for i in range(len(lengths)))
        self._report = GenerationReport(0, 0, tuple(lengths), truncated)

    async def generate(self, prompt, params):
        return list(range(len(self._report.lengths))), self._report


class RewardBy:
    """Scores a group with `rewards(serial of its prompt, number of completions)`."""

    def __init__(self, rewards) -> None:
        self._rewards = rewards

    async def score(self, prompt, completions, detail="rewards") -> Scores:
        rewards = tuple(map(float, self._rewards(prompt.serial, len(completions))))
        return Scores(rewards, {"task": rewards}, ())


@dataclass(frozen=True)
class Parcel:
    label: str
    content: object


class Worker:
    """An actor that shows what arrives in its process; it has neither `setup` nor `close`."""

    @returns_payload
    async def make(self, size):
        return np.arange(size), {"size": size}

    async def total(self, array, *, times=1):
        return int(array.sum()) * times

    async def totals(self, arrays):
        return [int(array.sum()) for array in arrays]

    async def open(self, parcel):
        return parcel.label, type(parcel.content).__name__, int(parcel.content.sum())

    async def process(self):
        return os.getpid()

    async def fail(self):
        raise RewardError("reward 'x' failed")

    @batched
    async def score(self, parcel, *, right=True):
        if not right:
            raise RewardError(f"{parcel.label} is not right")
        return parcel.label, int(parcel.content.sum())

    async def die(self):
        os._exit(1)


class MeetingRank:
    """One of two ranks that talk over a socket, which blocks a thread as a collective does."""

    def __init__(self, rank):
        self._rank, self._waits = rank, asyncio.Event()

    async def setup(self, rendezvous):
        await asyncio.to_thread(self._connect, rendezvous)

    def _connect(self, rendezvous):
        if self._rank == 0:
            with socket.create_server(("", rendezvous[1])) as server:
                self._peer, _ = server.accept()
            return
        while True:
            with suppress(ConnectionRefusedError):
                self._peer = socket.create_connection(rendezvous)
                return
            time.sleep(0.01)

    async def meet(self, word):
        self._peer.sendall(f"{word} from {self._rank}".encode())
        return f"{self._rank} heard {(await asyncio.to_thread(self._peer.recv, 99)).decode()}"

    async def wait_for_the_other(self):
        self._waits.set()
        if not await asyncio.to_thread(self._peer.recv, 99):
            raise ConnectionError("closed by the other")

    async def waits(self):
        await self._waits.wait()

    @returns_payload
    async def make(self, size):
        return np.full(size, self._rank + 1), self._rank

    async def total_of(self, arrays):
        return sum(int(array.sum()) for array in arrays)


def prepare_model(task, folder):
    return folder


@dataclass(frozen=True)
class ScaledGRPO(GRPO):
    """A user's loss, with a parameter of its own."""

    factor: float = 2.0

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        return super().per_token(x._replace(advantages_BT=self.factor * x.advantages_BT))


def above_half(rewards_G):
    """Advantages of somebody's own."""
    return rewards_G - 0.5
