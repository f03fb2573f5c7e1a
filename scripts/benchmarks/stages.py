"""The generator and the trainer of a real run, and stand-ins for each that cost nothing, to measure the other alone.

Completions are even where their limit is `EVEN_TOKENS`, else they have heavy tails: a prompt's number of stop tokens
says how likely each of its tokens is the last one, so lengths are geometric with a mean that differs from prompt to
prompt. The models are untrained: every token is about as likely as every other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from benchmarks.simulated_actors import IdleDataloader, IdleReward
from grpo.actors.generator import Generator
from grpo.actors.marks import replayed_on_join, returns_payload
from grpo.actors.replay_buffer import ReplayBuffer
from grpo.actors.specs import ActorSpec
from grpo.actors.trainer import Trainer
from grpo.config.schema import RunConfig
from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.models.loading import load_model, load_settings
from grpo.services.handle import ActorHandle
from grpo.types import Batch, Completion, GenerationReport, GeneratorStats, Prompt, SamplingParams
from grpo.weights.payload import Weights

PROMPT_TOKENS = 32
EVEN_TOKENS = 32
_STOP_TOKENS = (4, 4, 4, 4, 4, 2, 2, 2, 1, 1)  # by prompt; of 79: means of 20, 40 and 75, the last one cut at the limit


def specs(config: RunConfig) -> list[ActorSpec]:
    """The actors of a run, and beside the generator and the trainer one of each that costs nothing."""
    common = {"config": config, "threads": 1}
    return [
        ActorSpec("dataloader", IdleDataloader),
        ActorSpec("generator", StoppingGenerator, common),
        ActorSpec("instant_generator", InstantGenerator, {"config": config}),
        ActorSpec("reward", IdleReward),
        ActorSpec("replay_buffer", ReplayBuffer, {"window": config.buffer.reorder_window}),
        ActorSpec("trainer", Trainer, common),
        ActorSpec("instant_trainer", InstantTrainer, common),
    ]


def nouns(actors: Mapping[str, ActorHandle], *, generator: bool = True, trainer: bool = True) -> dict[str, ActorHandle]:
    """The actors of one run, with the instant ones where a real one is not wanted."""
    chosen = {name: actors[name] for name in ("dataloader", "generator", "reward", "replay_buffer", "trainer")}
    if not generator:
        chosen["generator"] = actors["instant_generator"]
    if not trainer:
        chosen["trainer"] = actors["instant_trainer"]
    return chosen


def _stop_tokens(prompt: Prompt, params: SamplingParams) -> int:
    return 0 if params.max_tokens == EVEN_TOKENS else _STOP_TOKENS[prompt.serial % len(_STOP_TOKENS)]


class StoppingGenerator(Generator):
    """The real one, but for what ends a completion."""

    async def setup(self) -> None:
        config = self._config
        model = await asyncio.to_thread(load_model, config.model, torch.float32, "cpu")
        limits = Limits(PROMPT_TOKENS, config.rollout.max_completion_tokens, config.generator.max_sequences)
        self._engine = TorchEngine(model, stop_token_ids=(), limits=limits, threads=self._threads)

    @returns_payload
    async def generate(self, prompt: Prompt, params: SamplingParams) -> tuple[list[Completion], GenerationReport]:
        stops = tuple(range(_stop_tokens(prompt, params)))
        return await super().generate(prompt, replace(params, stop_token_ids=stops))


class InstantGenerator:
    """Draws lengths like those of the real one, and has the tokens at once."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._version = config, 0

    async def setup(self) -> None:
        self._vocabulary = load_settings(self._config.model).vocab_size

    async def close(self) -> None: ...

    @returns_payload
    async def generate(self, prompt: Prompt, params: SamplingParams) -> tuple[list[Completion], GenerationReport]:
        rng = np.random.default_rng(params.seed)
        completions = [self._completion(rng, prompt, params) for _ in range(params.n)]
        lengths = tuple(len(completion.token_ids) for completion in completions)
        return completions, GenerationReport(self._version, self._version, lengths, (False,) * params.n)

    @replayed_on_join
    async def update_weights(self, weights: Weights) -> GeneratorStats:
        self._version = weights.version
        return GeneratorStats(0.0, 0)

    def _completion(self, rng: np.random.Generator, prompt: Prompt, params: SamplingParams) -> Completion:
        stops, length = _stop_tokens(prompt, params), params.max_tokens
        if stops:
            length = min(length, int(rng.geometric(stops / self._vocabulary)))
        logprobs = np.full(length, -np.log(self._vocabulary), dtype=np.float32)
        return Completion(rng.integers(self._vocabulary, size=length), logprobs, ((self._version, length),), "stop")


class InstantTrainer(Trainer):
    """Publishes what it holds, and learns nothing."""

    def _train_step(self, batch: Batch) -> dict[str, float]:
        ages = [self._learner.version - group.oldest_version for group in batch.groups]
        self._learner.version += 1
        return {"loss": 0.0, "policy_age/mean": float(np.mean(ages)), "policy_age/max": float(max(ages))}
