"""Calls and checks of reward functions, run in the reward actor's processes.

Imports little, so that the processes start fast and stay small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from grpo.config.algorithm import TaskConfig
from grpo.errors import RewardError, RewardInvalid, RewardMemory
from grpo.rewards import REWARDS, RewardFunction
from grpo.tasks.base import Task, make_task
from grpo.types import Problem
from grpo.utils.imports import import_target

Parts = dict[str, tuple[float, ...]]


class Scorer:
    """Score groups with the named reward functions. The task is made only if `task` is among them."""

    def __init__(self, task: TaskConfig, names: Sequence[str]) -> None:
        scored_by = make_task(task) if "task" in names else None
        self._functions = {name: reward_function(name, scored_by) for name in names}

    def __call__(self, set_label: Callable[[str], None], problem: Problem, texts: Sequence[str]) -> Parts:
        """Return the scores by reward function, and raise as `evaluate`. `set_label` gets the name of the next call."""
        parts = {}
        for name, function in self._functions.items():
            set_label(described(name, problem))
            parts[name] = evaluate(name, function, problem, texts)
        return parts


def reward_function(name: str, task: Task | None) -> RewardFunction:
    """Look up `task`, a name in REWARDS, or `module:function`. Raises ConfigError if there is no such function."""
    if name == "task" and task is not None:
        return lambda problem, texts: [task.score(problem, text) for text in texts]
    return import_target(REWARDS.get(name, name), key="reward.functions")


def described(name: str, problem: Problem) -> str:
    """Return how errors name a call of a reward function."""
    return f"reward {name!r} on prompt {problem.question[:80]!r}"


def evaluate(name: str, function: RewardFunction, problem: Problem, texts: Sequence[str]) -> tuple[float, ...]:
    """Call one reward function and check what it returns.

    Raises RewardInvalid for scores that are not finite or too few or many, RewardMemory, a RewardError of this package
    that the function itself raises, or a plain RewardError for any other exception. Each names the reward and the
    prompt.
    """
    where = described(name, problem)
    try:
        scores = tuple(float(score) for score in function(problem, texts))
    except RewardError as error:  # other processes may not know a user's own subclass
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == RewardError.__module__)
        raise kind(f"{where}: {error}") from error
    except MemoryError as error:
        raise RewardMemory(f"{where} asked for more memory than reward.memory_gb allows") from error
    except BaseException as error:  # even SystemExit: `reward.on_error` decides
        raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise RewardInvalid(f"{where} returned {len(scores)} scores for {len(texts)} completions")
    if not all(math.isfinite(score) for score in scores):
        raise RewardInvalid(f"{where} returned {scores}; rewards must be finite")
    return scores
