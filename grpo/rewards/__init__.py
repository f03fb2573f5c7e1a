"""Reward functions: (problem, texts of the G completions) -> G numbers. Add one: write it, put it into REWARDS.

`task`, the task's own scoring, needs no entry; other code is named as `module:function` in `reward.functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.rewards.thinking import thinking
from grpo.types import Problem

RewardFunction = Callable[[Problem, Sequence[str]], Sequence[float]]

REWARDS: dict[str, RewardFunction] = {"thinking": thinking}
