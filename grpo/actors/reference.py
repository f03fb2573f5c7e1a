"""The reference actor: log-probabilities under the frozen reference model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.actors.marks import returns_payload
from grpo.config.schema import RunConfig
from grpo.learner.batch import Sample, make_sample
from grpo.learner.logprobs import TokenLogprobs
from grpo.models.loading import load_model
from grpo.telemetry.recording import span
from grpo.types import Completion, Floats, Prompt
from grpo.utils.torch_utils import ComputeThread, run_in_temp_thread


class Reference:
    """One replica of the reference service: the model before training.

    Example:
        reference = Reference(config)
        await reference.setup()
        logprobs, _ = await reference.logprobs(prompt, completions)  # float32 [N] for each completion
    """

    def __init__(self, config: RunConfig, *, device: str = "cpu", threads: int = 0) -> None:
        self._config, self._device, self._threads = config, device, threads
        self._thread = ComputeThread("reference", threads)

    async def setup(self) -> None:
        config = self._config
        model = await run_in_temp_thread(
            self._threads, load_model, config.model, getattr(torch, config.model.dtype), self._device
        )
        self._logprobs = await self._thread.run(  # probes the model
            TokenLogprobs, model, config.rollout.temperature or 1.0, config.trainer.packing
        )

    @returns_payload
    async def logprobs(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[list[Floats], None]:
        """Return float32 [N] for each completion of a group, for its N sampled tokens."""
        samples = [make_sample(prompt.token_ids, completion) for completion in completions]
        return await self._thread.run(self._forward, samples), None

    async def close(self) -> None:
        self._thread.close()

    def _forward(self, samples: Sequence[Sample]) -> list[Floats]:
        with span("forward", completions=len(samples)):
            return self._logprobs.of_samples(samples, self._config.reference.micro_batch_tokens)
