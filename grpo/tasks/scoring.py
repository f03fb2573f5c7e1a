"""What the reward actor's processes run: the reward functions of a config, called and checked.

Imports little, for the processes to start fast and stay small.
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
    """Scores groups with the named reward functions. The task is made only where its own scoring is among them."""

    def __init__(self, task: TaskConfig, names: Sequence[str]) -> None:
        made = make_task(task) if "task" in names else None
        self._functions = {name: reward_function(name, made) for name in names}

    def __call__(self, doing: Callable[[str], None], problem: Problem, texts: Sequence[str]) -> Parts:
        """The scores by reward function; `doing` is told before each which one runs. Raises what `evaluate` raises."""
        parts = {}
        for name, function in self._functions.items():
            doing(described(name, problem))
            parts[name] = evaluate(name, function, problem, texts)
        return parts


def reward_function(name: str, task: Task | None) -> RewardFunction:
    """`task`, an entry of REWARDS, or `module:function`. Raises ConfigError when there is no such function."""
    if name == "task" and task is not None:
        return lambda problem, texts: [task.score(problem, text) for text in texts]
    return import_target(REWARDS.get(name, name), key="reward.functions")


def described(name: str, problem: Problem) -> str:
    """The words under which errors name a call of a reward function."""
    return f"reward {name!r} on prompt {problem.question[:80]!r}"


def evaluate(name: str, function: RewardFunction, problem: Problem, texts: Sequence[str]) -> tuple[float, ...]:
    """Call one reward function and check what it returns.

    Raises RewardInvalid, RewardMemory, the RewardError of this package that the function itself raises, or a plain
    RewardError for anything else that it raises; each names the reward and the prompt.
    """
    where = described(name, problem)
    try:
        scores = tuple(float(score) for score in function(problem, texts))
    except RewardError as error:  # that of a user's own subclass arrives in other processes as its parent
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == RewardError.__module__)
        raise kind(f"{where}: {error}") from error
    except MemoryError as error:
        raise RewardMemory(f"{where} asked for more memory than reward.memory_gb allows") from error
    except BaseException as error:  # whatever user code raises: the run's `reward.on_error` decides
        raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise RewardInvalid(f"{where} returned {len(scores)} scores for {len(texts)} completions")
    if not all(math.isfinite(score) for score in scores):
        raise RewardInvalid(f"{where} returned {scores}; rewards must be finite")
    return scores
