"""The protocol every engine follows, and how a generator finds its engine."""

from __future__ import annotations

from typing import Protocol

from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.weights import Weights


class Engine(Protocol):
    """Generates groups of completions and takes new weights while doing so."""

    @property
    def version(self) -> int:
        """Policy version of the weights that the next decode step will use."""
        ...

    async def generate(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions of one prompt [prompt length]. Cancelling the call aborts the request."""
        ...

    async def update_weights(self, weights: Weights) -> None:
        """Return once every further token is sampled under `weights`."""
        ...

    def stats(self) -> GeneratorStats: ...

    async def close(self) -> None:
        """Abort what is running and free threads and processes."""
        ...
