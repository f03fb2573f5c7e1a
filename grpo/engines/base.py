"""The protocol every engine follows, and what the engines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.weights.payload import Weights

WeightUpdate = Literal["in_flight", "in_flight_recompute", "drain"]


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

    async def ping(self) -> None:
        """Return when whatever computes still answers."""
        ...

    def stats(self) -> GeneratorStats: ...

    async def close(self) -> None:
        """Abort what is running and free threads and processes."""
        ...


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many completions are decoded together."""

    max_prompt_tokens: int
    max_completion_tokens: int
    max_sequences: int

    def check(self, prompt_ids: Ints, params: SamplingParams) -> None:
        """Raise ValueError for a request that can't fit."""
        if not 0 < len(prompt_ids) <= self.max_prompt_tokens:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens; the engine takes 1 to {self.max_prompt_tokens}")
        if not 0 < params.max_tokens <= self.max_completion_tokens:
            raise ValueError(f"max_tokens={params.max_tokens}; the engine takes 1 to {self.max_completion_tokens}")
        if not 0 < params.n <= self.max_sequences:
            raise ValueError(f"n={params.n} completions; the engine holds {self.max_sequences}")
