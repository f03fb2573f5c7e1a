"""Sums, differences and products of small numbers, as questions in words."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from itertools import product

import numpy as np

from grpo.errors import ConfigError
from grpo.tasks.base import Split
from grpo.types import Problem

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_INTEGER = re.compile(r"-?\d+")


class Arithmetic:
    """All pairs of numbers in 0..`largest` under each operation, shuffled by `seed`.

    The fraction `held_out_share` of the problems is held out. `question` is a template with the field {expression}. The
    reward is 1 if the last integer of the answer is the result.
    """

    def __init__(
        self,
        largest: int = 99,
        operations: str = "+-",
        question: str = "What is {expression}? Answer with just the number.",
        held_out_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if unknown := set(operations) - set(_OPERATIONS):
            raise ConfigError(f"{sorted(unknown)[0]!r} is not one of + - *", key="task.args.operations")
        numbers = range(largest + 1)
        problems = [
            Problem(question.format(expression=f"{a} {sign} {b}"), answer=str(_OPERATIONS[sign](a, b)))
            for sign, a, b in product(operations, numbers, numbers)
        ]
        order = np.random.default_rng(seed).permutation(len(problems))
        shuffled = [problems[i] for i in order]
        held_out = round(len(problems) * held_out_share)
        self._splits = {"held_out": shuffled[:held_out], "train": shuffled[held_out:]}

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def score(self, problem: Problem, completion: str) -> float:
        numbers = _INTEGER.findall(completion)
        return float(bool(numbers) and int(numbers[-1]) == int(problem.answer))
