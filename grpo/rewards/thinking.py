"""Format reward for reasoning inside tags before the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.types import Problem

_FORMAT = re.compile(r"\s*<think>\s*\S.*?</think>.*\S.*", re.DOTALL)


def thinking(problem: Problem, completions: Sequence[str]) -> list[float]:
    """Return 1 for each completion with one pair of `<think>` tags and an answer after it, both non-empty, else 0."""
    return [
        float(bool(_FORMAT.fullmatch(text)) and text.count("<think>") == text.count("</think>") == 1)
        for text in completions
    ]
