"""The protocol of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from grpo.types import Problem

Split = Literal["train", "held_out"]


class Task(Protocol):
    """Prompts and scoring. The constructor takes what stands under `task.args` in the config."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, the same ones in the same order at every call; the splits share none."""
        ...

    def score(self, problem: Problem, completion: str) -> float:
        """The reward of one answer, finite; by convention in [0, 1]. Special tokens are already removed."""
        ...
