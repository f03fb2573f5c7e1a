"""Protocol that every engine follows, and the limits that every engine checks a request against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from grpo.telemetry.recording import measure
from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.weights.payload import Weights

WeightUpdate = Literal["in_flight", "in_flight_recompute", "drain"]


class Engine(Protocol):
    """Generate groups of completions, and swap in new weights between two decode steps.

    Example: an engine without a model, which answers every prompt with the token 5.

        class ConstantEngine:
            version = 0

            async def generate(self, prompt_ids, params):
                count = params.max_tokens
                logprobs = np.zeros(count, dtype=np.float32)
                return [Completion(np.full(count, 5), logprobs, ((self.version, count),), "length")] * params.n

            async def update_weights(self, weights):
                self.version = weights.version

            async def ping(self): ...
            def stats(self): return GeneratorStats(busy_s=0.0, tokens=0)
            async def close(self): ...
    """

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
        """Return once the process or thread that computes has answered."""
        ...

    def stats(self) -> GeneratorStats: ...

    async def close(self) -> None:
        """Abort running requests and free threads and processes."""
        ...


@dataclass(frozen=True)
class Limits:
    """Largest request that an engine accepts, and the number of completions that it decodes together.

    With `several_turns` the tokens of earlier turns come back as part of a prompt. The whole sequence still has at most
    `context` tokens.
    """

    max_prompt_tokens: int
    max_completion_tokens: int
    max_sequences: int
    several_turns: bool = False

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def longest_prompt(self) -> int:
        return self.context - 1 if self.several_turns else self.max_prompt_tokens

    def check(self, prompt_ids: Ints, params: SamplingParams) -> None:
        """Raise ValueError for a request that can't fit."""
        for name, value, most, key in (
            ("prompt_tokens", len(prompt_ids), self.longest_prompt, "rollout.max_prompt_tokens"),
            (
                "max_tokens",
                params.max_tokens,
                min(self.max_completion_tokens, self.context - len(prompt_ids)),
                "rollout.max_completion_tokens",
            ),
            ("n", params.n, self.max_sequences, "generator.max_sequences"),
        ):
            if not 0 < value <= most:
                raise ValueError(f"{name}={value} must be 1 to {most} ({key})")


def measure_prompt_tokens(*, read: int, kept: int) -> None:
    """Count tokens of prompts: those that were read, and those whose keys and values were there already."""
    if read or kept:
        measure("generator/prompt_tokens_read", read, "sum")
        measure("generator/prompt_tokens_kept", kept, "sum")
