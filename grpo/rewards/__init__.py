"""Reward functions: (problem, texts of the G completions) -> G numbers. Add one: write it, put it into REWARDS.

`task`, the task's own scoring, needs no entry; other code is named as `my_module.my_function` in `reward.functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.types import Problem

RewardFunction = Callable[[Problem, Sequence[str]], Sequence[float]]

# Short names. A module is imported when a config asks for it: some need more than this package installs.
REWARDS = {
    "final_answer": "grpo.rewards.final_answer:final_answer",
    "math_verify": "grpo.rewards.math_verify:math_verify",
    "thinking": "grpo.rewards.thinking:thinking",
}
