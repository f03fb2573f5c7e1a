"""Arithmetic that a small model gets wrong by itself and right with a calculator, which it has to learn to use."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from grpo.environments import Message, Opening, Reply
from grpo.errors import ConfigError
from grpo.tasks.base import Split
from grpo.types import Problem

_OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
KINDS = {
    "times": ("What is {a} times {b}?", "*"),
    "product": ("What is the product of {a} and {b}?", "*"),
    "plus": ("What is {a} plus {b}?", "+"),
    "more": ("What is {a} more than {b}?", "+"),
    "minus": ("What is {a} minus {b}?", "-"),
    "less": ("What is {b} less than {a}?", "-"),
}
_CALL = re.compile(r"calc\(\s*(\d{1,6})\s*([-+*])\s*(\d{1,6})\s*\)")
_ANSWER = re.compile(r"-?\d{1,9}")
_ERROR = "error"


class Calculator:
    """`per_kind` problems of each of `kinds`, drawn by `seed`, with numbers of two digits.

    Every prompt begins with an example of how the calculator is used, which also tells a model without a format for
    tools what a call looks like: `calc(12*3)`. The episode is over when the policy says something else; its reward is 1
    if that is the right number and nothing more. The fraction `held_out_share` of each kind is held out.

    Example: an episode, after that example.

        What is 17 less than 61? Use the calculator.
        calc(61-17)     the policy
        44              the calculator
        44              the policy, which earns 1
    """

    def __init__(
        self,
        kinds: Sequence[str] = tuple(KINDS),
        per_kind: int = 200,
        instruction: str = "Use the calculator.",
        held_out_share: float = 0.25,
        seed: int = 0,
    ) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise ConfigError(f"{sorted(unknown)} unknown; there are {list(KINDS)}", key="task.args.kinds")
        self._instruction = instruction
        rng = np.random.default_rng(seed)
        pairs = list(combinations(range(12, 100), 2))
        self._splits: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        for kind in kinds:
            drawn = [pairs[i] for i in rng.choice(len(pairs), min(per_kind, len(pairs)), replace=False)]
            problems = [_problem(kind, larger, smaller) for smaller, larger in drawn]
            held_out = round(held_out_share * len(problems))
            self._splits["held_out"] += problems[:held_out]
            self._splits["train"] += problems[held_out:]
        for problems in self._splits.values():
            rng.shuffle(problems)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def environment(self, problem: Problem, seed: int) -> CalculatorEpisode:
        return CalculatorEpisode(problem, self._instruction)


class CalculatorEpisode:
    """One question. `episode/right_calls` counts the calls whose result is the answer."""

    def __init__(self, problem: Problem, instruction: str) -> None:
        self._question, self._answer, self._instruction = problem.question, int(problem.answer), instruction

    async def begin(self) -> Opening:
        example = (
            Message("user", f"What is 12 times 3? {self._instruction}"),
            Message("assistant", "calc(12*3)"),
            Message("user", "36"),
            Message("assistant", "36"),
        )
        return Opening((Message("system", ""), *example, Message("user", f"{self._question} {self._instruction}")))

    async def reply(self, said: Message) -> Reply:
        text = said.content.strip()
        if not text.startswith("calc("):
            right = _ANSWER.fullmatch(text) is not None and int(text) == self._answer
            return Reply(done=True, reward=float(right))
        call = _CALL.fullmatch(text)
        result = None if call is None else _OPERATORS[call[2]](int(call[1]), int(call[3]))
        metrics = {"tool_calls": 1, "tool_errors": result is None, "right_calls": result == self._answer}
        return Reply((Message("user", _ERROR if result is None else str(result)),), metrics=metrics)


def _problem(kind: str, a: int, b: int) -> Problem:
    question, sign = KINDS[kind]
    return Problem(question.format(a=a, b=b), str(_OPERATORS[sign](a, b)))
