"""Engine without a model: configured latencies, lengths and failures, for tests and for planning."""

from __future__ import annotations

import asyncio

import numpy as np

from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.utils.torch_utils import BusyClock
from grpo.weights.payload import Weights


class SimulatedEngine:
    """Answer each group after `latency_s`, times a lognormal factor of median 1 and shape `latency_sigma`.

    Lengths are geometric with mean `mean_tokens`, cut at the request's limit. With `mean_tokens` None every completion
    fills its limit. A call fails with RuntimeError with probability `failure_rate`. All randomness follows from the
    request's seed.
    """

    def __init__(
        self,
        latency_s: float = 0.0,
        latency_sigma: float = 0.0,
        mean_tokens: float | None = None,
        failure_rate: float = 0.0,
        load_s: float = 0.0,
        vocabulary: int = 32,
    ) -> None:
        self.version = 0
        self._latency_s, self._latency_sigma, self._load_s = latency_s, latency_sigma, load_s
        self._mean_tokens, self._failure_rate, self._vocabulary = mean_tokens, failure_rate, vocabulary
        self._clock, self._tokens = BusyClock(), 0

    async def generate(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        rng = np.random.default_rng(params.seed)
        version = self.version
        with self._clock.busy():
            await asyncio.sleep(self._latency_s * float(rng.lognormal(0.0, self._latency_sigma)))
        if rng.random() < self._failure_rate:
            raise RuntimeError("simulated engine failure")
        completions = [self._completion(rng, version, params.max_tokens) for _ in range(params.n)]
        self._tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    async def update_weights(self, weights: Weights) -> None:
        await asyncio.sleep(self._load_s)
        self.version = weights.version

    async def ping(self) -> None:
        """In-process: always healthy."""

    def stats(self) -> GeneratorStats:
        """Count as busy the time during which at least one group is running."""
        return GeneratorStats(busy_s=self._clock.seconds, tokens=self._tokens)

    async def close(self) -> None:
        """Do nothing: there are no threads and no processes."""

    def _completion(self, rng: np.random.Generator, version: int, max_tokens: int) -> Completion:
        length = max_tokens + 1 if self._mean_tokens is None else int(rng.geometric(1 / self._mean_tokens))
        cut = min(length, max_tokens)
        return Completion(
            token_ids=rng.integers(self._vocabulary, size=cut),
            logprobs=np.full(cut, -np.log(self._vocabulary), dtype=np.float32),
            versions=((version, cut),),
            finish_reason="length" if length > max_tokens else "stop",
        )
