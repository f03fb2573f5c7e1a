"""Equivalence of mathematical expressions, by the math-verify library (extra `math`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from grpo.types import ConfigError, Problem

try:
    from math_verify import parse, verify

    from grpo.rewards.killable import Killable
except ImportError as error:
    raise ConfigError("math_verify needs a library: pip install 'grpo[math]'", key="reward.functions") from error

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time-outs that are switched off below


def math_verify(problem: Problem, completions: Sequence[str]) -> list[float]:
    """1 for a completion whose answer equals the problem's as an expression, 0.5 or \\frac{1}{2} alike; else 0.

    It runs where a time-out can kill it. Raises RewardTimeout then, and ValueError for a problem whose answer can't be
    read.
    """
    return list(map(float, _equivalent.map((problem.answer, text) for text in completions)))


def equivalent(answer: str, completion: str) -> bool:
    """Whether the last expression of a completion equals the answer. Simplifying may take for ever."""
    expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify finds no expression in the problem's answer {answer!r}")
    return verify(expected, parse(completion, parsing_timeout=None), timeout_seconds=None)


_equivalent = Killable(equivalent, timeout_s=5.0)
