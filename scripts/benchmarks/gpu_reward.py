"""A reward that random answers differ in; a module of its own, so that the processes that score import nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.types import Problem


def brevity(problem: Problem, completions: Sequence[str]) -> list[float]:
    return [-len(text) / 1000 for text in completions]
