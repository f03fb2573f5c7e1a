"""What a task is, and making the one that a config names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal, Protocol

from grpo.config import TaskConfig
from grpo.imports import check_arguments, import_target
from grpo.types import ConfigError, Problem

Split = Literal["train", "held_out"]


class Task(Protocol):
    """Prompts and scoring. The constructor takes what stands under `task.args` in the config."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, the same ones in the same order at every call; the splits share none."""
        ...

    def score(self, problem: Problem, completion: str) -> float:
        """The reward of one answer, finite; by convention in [0, 1]. Special tokens are already removed."""
        ...


def make_task(config: TaskConfig) -> Task:
    """The task that the config names; `path` goes to one that reads a file.

    Raises ConfigError for an unknown target or argument, and for a path to a task that takes none.
    """
    target = import_target(config.target, key="task.target")
    check_arguments(target, config.args, key="task.args")
    args = dict(config.args)
    if config.path is not None:
        if "path" not in inspect.signature(target).parameters:
            raise ConfigError(f"{config.target} reads no file; leave it out", key="task.path")
        args["path"] = config.path
    task: Task = target(**args)
    return task
