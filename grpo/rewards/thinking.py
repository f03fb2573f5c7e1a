"""A format reward: did the model reason inside tags before it answered?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.types import Problem

_FORMAT = re.compile(r"\s*<think>\s*\S.*?</think>.*\S.*", re.DOTALL)


def thinking(problem: Problem, completions: Sequence[str]) -> list[float]:
    """1 for `<think>...</think>` followed by an answer, both non-empty, with one pair of tags; else 0."""
    return [
        float(bool(_FORMAT.fullmatch(text)) and text.count("<think>") == text.count("</think>") == 1)
        for text in completions
    ]
