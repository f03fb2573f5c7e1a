"""What two frameworks are asked to do alike, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PROMPTS_PER_STEP, COMPLETIONS = 16, 8
SAMPLES_PER_STEP = PROMPTS_PER_STEP * COMPLETIONS
THREADS = 2  # in all


@dataclass(frozen=True)
class Case:
    """A training from the Hugging Face folder `model` on a task without arguments; the model is kept every `save_every`
    steps, 0 for never."""

    model: str
    task: str
    most_tokens: int
    steps: int
    lr: float
    lr_schedule: str = "constant"
    seed: int = 0
    save_every: int = 0


@dataclass(frozen=True)
class Training:
    """`ended_s` is when each step ended, in seconds since the first began, what saving took left out.

    `startup_s` goes from the command to the end of the first step; `truncated` is the share of the completions cut off.
    """

    startup_s: float
    ended_s: Sequence[float]
    mean_tokens: float
    truncated: float
    peak_gib: float = 0.0
    saved: Mapping[int, Path] = field(default_factory=dict)  # by the number of the step

    def samples_per_s(self, warm_up: int) -> float:
        """After so many steps."""
        steps = len(self.ended_s) - warm_up
        return SAMPLES_PER_STEP * steps / (self.ended_s[-1] - self.ended_s[warm_up - 1])

    def seconds_to(self, reward: float, rewards: Mapping[int, float]) -> float | None:
        """When the reward was first reached, between the measured steps by straight lines; None if it never was.

        `rewards` by step, 0 for the start.
        """
        at_s = {step: self.ended_s[step - 1] if step else 0.0 for step in sorted(rewards)}
        steps = list(at_s)
        for before, after in zip([steps[0], *steps], steps, strict=False):
            if rewards[after] >= reward:
                return float(np.interp(reward, [rewards[before], rewards[after]], [at_s[before], at_s[after]]))
        return None
