"""Reward functions: (problem, texts of the G completions) -> G numbers.

`reward.functions` in the config weights them: by a name in REWARDS, `task` for the task's own scoring, or
`my_module:my_function` for other code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.types import Problem

RewardFunction = Callable[[Problem, Sequence[str]], Sequence[float]]

# Imported only when a config names them: some need libraries that this package does not install.
REWARDS = {
    "final_answer": "grpo.rewards.final_answer:final_answer",
    "math_verify": "grpo.rewards.math_verify:math_verify",
    "thinking": "grpo.rewards.thinking:thinking",
}
