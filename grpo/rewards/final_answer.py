r"""The final answer of a completion: finding it, and a format reward for giving exactly one.

The forms that mark it, the strongest first: `\boxed{72}`, `<answer>72</answer>`, and `#### 72`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grpo.rewards.numbers import numbers_in, parse_number
from grpo.types import Problem

_BRACES = re.compile(r"\\boxed\s?\{|\\?[{}]")
_TAGS = re.compile(r"<answer>((?:[^<]|<(?!/?answer>))*+)</answer>")
_HASHES = re.compile(  # `#### Step 2` and `#### 2. Add` are headlines
    r"####[ \t]*((?=[-−–$\\.]{0,3}[0-9])(?![0-9]{1,2}[.)][ \t*]*[^\W\d_])[^\n]*)"
)
_PHRASE = re.compile(r"\banswer(?: is\b|:)", re.IGNORECASE)
_CLOSING = re.compile(r"[\s.$*)\]\\]*")  # the end of a sentence, of maths or of bold print may follow


@dataclass(frozen=True)
class _Marked:
    content: str
    end: int


def final_answer(problem: Problem, completions: Sequence[str]) -> list[float]:
    """1 for a completion that marks one answer, in one of the three forms, and ends with it; else 0.

    The answer need not be right, nor a number: give this a small weight beside the reward that looks at that.
    """
    return [float(_ends_with_one_answer(text)) for text in completions]


def final_number(text: str) -> Fraction | None:
    """The number given as the final answer, exactly; None when there is none.

    It stands in the last of the strongest marks, else after "the answer is" and the last equals sign of that line,
    else it is the last number of the text. A mark that holds no number, or several, is a wrong answer: what stands
    elsewhere doesn't mend it.
    """
    for marks in (_boxed(text), _matched(_TAGS, text), _matched(_HASHES, text)):
        if marks:
            return parse_number(marks[-1].content)
    *_, after = _PHRASE.split(text)
    if after != text and (numbers := numbers_in(after.partition("\n")[0].rpartition("=")[2])):
        return numbers[0]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def _ends_with_one_answer(text: str) -> bool:
    marks = [*_boxed(text), *_matched(_TAGS, text), *_matched(_HASHES, text)]
    return len(marks) == 1 and bool(marks[0].content.strip()) and bool(_CLOSING.fullmatch(text, marks[0].end))


def _matched(pattern: re.Pattern[str], text: str) -> list[_Marked]:
    return [_Marked(match[1], match.end()) for match in pattern.finditer(text)]


def _boxed(text: str) -> list[_Marked]:
    """What stands in closed boxes, in the order of their ends; braces nest. One pass, however many stay open."""
    found: list[_Marked] = []
    opened: list[re.Match[str]] = []
    for match in _BRACES.finditer(text):
        if match[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{":
                found.append(_Marked(text[start.end() : match.start()], match.end()))
        elif match[0].endswith("{") and match[0] != r"\{":
            opened.append(match)
    return found
