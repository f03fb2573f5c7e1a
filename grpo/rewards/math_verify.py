"""Equivalence of mathematical expressions, by the math-verify library (extra `math`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from grpo.errors import ConfigError
from grpo.types import Problem

try:
    from math_verify import parse, verify
except ImportError as error:
    raise ConfigError("math_verify needs a library: pip install -e '.[math]'", key="reward.functions") from error
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time-outs that are switched off below


def math_verify(problem: Problem, completions: Sequence[str]) -> list[float]:
    """1 for a completion whose answer equals the problem's as an expression, 0.5 or \\frac{1}{2} alike; else 0.

    Simplifying may take for ever: `reward.timeout_s` ends it, the library's own time-outs (`signal.alarm`, which only
    works in a main thread) are switched off. Raises ValueError for a problem whose answer can't be read.
    """
    expected = parse(f"\\boxed{{{problem.answer}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify finds no expression in the problem's answer {problem.answer!r}")
    return [float(_equivalent(expected, text)) for text in completions]


def _equivalent(expected: list[Any], completion: str) -> bool:
    return verify(expected, parse(completion, parsing_timeout=None), timeout_seconds=None)
