"""Reward for an equivalent mathematical expression, by the math-verify library (extra `math`)."""

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
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the disabled time-outs below


def math_verify(problem: Problem, completions: Sequence[str]) -> list[float]:
    """Return 1 for each completion whose answer equals the problem's as an expression (0.5 and \\frac{1}{2}), else 0.

    Simplifying can hang until `reward.timeout_s`: the library's own time-outs use `signal.alarm`, which works only in
    a main thread, so they are disabled. Raises ValueError if the problem's answer can't be parsed.
    """
    expected = parse(f"\\boxed{{{problem.answer}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify can't parse the problem's answer {problem.answer!r}")
    return [float(_equivalent(expected, text)) for text in completions]


def _equivalent(expected: list[Any], completion: str) -> bool:
    return verify(expected, parse(completion, parsing_timeout=None), timeout_seconds=None)
