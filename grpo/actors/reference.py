"""Log-probabilities under the frozen reference model. One replica of the reference service."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.compute import ComputeThread, run_apart
from grpo.config import RunConfig
from grpo.learner.collate import Sample, make_sample
from grpo.learner.logprobs import sample_logprobs
from grpo.models.loading import load_model
from grpo.services import returns_payload
from grpo.telemetry.recording import span
from grpo.types import Completion, Floats, Prompt


class Reference:
    """The model as it was before training."""

    def __init__(self, config: RunConfig, *, device: str = "cpu", threads: int = 0) -> None:
        self._config, self._device, self._threads = config, device, threads
        self._thread = ComputeThread("reference", threads)

    async def setup(self) -> None:
        self._model = await run_apart(
            self._threads, load_model, self._config.model, getattr(torch, self._config.model.dtype), self._device
        )

    @returns_payload
    async def logprobs(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[list[Floats], None]:
        """float32 [T] for each completion of a group."""
        samples = [make_sample(prompt.token_ids, completion) for completion in completions]
        return await self._thread.run(self._logprobs, samples), None

    async def close(self) -> None:
        self._thread.close()

    def _logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        temperature = self._config.rollout.temperature or 1.0
        with span("forward", completions=len(samples)):
            return sample_logprobs(self._model, samples, temperature, self._config.reference.micro_batch_tokens)
