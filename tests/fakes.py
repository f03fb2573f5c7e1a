"""Rewards and actors that the tests put in place of real ones."""

import asyncio
import os
from dataclasses import dataclass

import numpy as np

from grpo.services import returns_payload
from grpo.types import Batch, GeneratorStats, RewardError
from grpo.weights import Weights


def vowel_share(problem, completions):
    """Varies within a group even for a random model, so that there is something to learn."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def raising(problem, completions):
    raise ValueError("cannot score this")


def sometimes_raising(problem, completions):
    if len(problem.question) % 2:
        raise ValueError("an odd question")
    return vowel_share(problem, completions)


def not_a_number(problem, completions):
    return [float("nan")] * len(completions)


def too_few(problem, completions):
    return [0.0]


def dying(problem, completions):
    os._exit(7)


class CountingTrainer:
    """A trainer that only counts versions and remembers what it was given."""

    def __init__(self) -> None:
        self.version = 0
        self.batches: list[Batch] = []
        self.ages: list[int] = []

    async def train_step(self, batch: Batch) -> dict[str, float]:
        self.batches.append(batch)
        ages = [self.version - group.oldest_version for group in batch.groups]
        self.ages += ages
        self.version += 1
        return {"loss": 0.0, "policy_age/max": float(max(ages)), "policy_age/mean": sum(ages) / len(ages)}

    async def push_weights(self) -> tuple[Weights, int]:
        return Weights(self.version, (), None), self.version


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


@dataclass(frozen=True)
class Parcel:
    label: str
    content: object


class Worker:
    """An actor that shows what arrives in its process."""

    @returns_payload
    async def make(self, size):
        return np.arange(size), {"size": size}

    async def total(self, array, *, times=1):
        return int(array.sum()) * times

    async def open(self, parcel):
        return parcel.label, type(parcel.content).__name__, int(parcel.content.sum())

    async def process(self):
        return os.getpid()

    async def fail(self):
        raise RewardError("reward 'x' failed")

    async def die(self):
        os._exit(1)


def prepare_model(task, name):
    return f"/models/{name}"
