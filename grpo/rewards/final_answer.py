r"""The final answer of a completion, a format reward for giving exactly one, and exact numbers in text.

A final answer is marked in one of three forms, the strongest first: `\boxed{72}`, `<answer>72</answer>`, `#### 72`.

Numbers are read as people and models write them:

    -3   −3   1,234   1{,}234   1_234   1,000.50   .5   72.   1e6   1.5 \times 10^3   3/4   \frac{3}{4}   1 1/2
    \$18   USD18   50%   72 clips   72\text{ clips}

A percent sign is a unit like any other: 50% is 50. A plain space separates numbers: `1 000` is two numbers. Roots and
multiples of pi are not numbers here: \sqrt{72}, 2\pi.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grpo.types import Problem

_LONGEST = 100  # characters, with an exponent of 3 digits; longer numbers take time and memory to read
_TIMES_POWER_OF_TEN = r"(?<=[0-9])\s?(?:\\times|\\cdot|×)\s?10\^(?:\{(-?[0-9]{1,3})\}|([0-9])(?![0-9]))"
# Applied in this order before numbers are matched.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"\\!", ""),  # a negative space: 1,\!234
        (r"\*\*", " "),  # bold
        (r"\{,\}", ","),
        (r"(?<=[0-9])(?:\\,|\\?_|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),
        (_TIMES_POWER_OF_TEN, r"e\1\2"),
        (r"\s?(?:\\sqrt\s?\{[^{}]{1,100}\}|\\sqrt|\\pi(?![A-Za-z])|[√π])\s?", "_"),  # hides adjacent digits
        (r"-\\?[$€£¥]\s?", "-"),
        (r"\\?[$€£¥]", " "),
        (r"^\s*-\s+", "-"),  # with a space it is a sign at the start, and a dash elsewhere
        (r"(?<=[0-9])\\[dt]?frac", r" \\frac"),
        (r"\\[dt]?frac\s?\{([^{}]{1,100})\}\s?\{([^{}]{1,100})\}", r"\1/\2"),
        (r"\\[dt]?frac\s?([0-9])\s?([0-9])", r"\1/\2"),
        (r"(?<=[A-Za-z])\}?\^\{?[23]\}?", " "),  # the exponent of a unit
        (r"\\[A-Za-z]++|(?<![A-Za-z])(?:USD|EUR|GBP|or|and|to)(?=[0-9])", " "),  # would hide adjacent digits
    )
]
_PLAIN = r"""
    (?: (?<!\w) (?<!_/) (?<![0-9]\.) (?: [0-9]{1,3} (?:,[0-9]{3}){1,30}+ (?![0-9]) | [0-9]++ ) (?:\.[0-9]++)?+
      | (?<![\w.]) \.[0-9]++
    )
    (?: [eE] [+-]? [0-9]++ )?+
    (?! \.?[0-9] | /?_ )
"""
_NUMBER = re.compile(
    rf"""
    (?P<minus> (?<![\w)\]}}]) - )?  # after a number or a bracket it subtracts
    (?: (?P<whole> [0-9]{{1,30}}+ ) \s (?= [0-9]{{1,30}}+/[0-9] ) )?
    (?P<top> {_PLAIN} ) (?: \s?/\s? (?P<bottom> -? {_PLAIN} ) )?
    """,
    re.VERBOSE,
)
_BRACES = re.compile(r"\\boxed\s?\{|\\?[{}]")
_TAGS = re.compile(r"<answer>((?:[^<]|<(?!/?answer>))*+)</answer>")
_HASHES = re.compile(  # `#### Step 2` and `#### 2. Add` are headings
    r"####[ \t]*((?=[-−–$\\.]{0,3}[0-9])(?![0-9]{1,2}[.)][ \t*]*[^\W\d_])[^\n]*)"
)
_PHRASE = re.compile(r"\banswer(?: is\b|:)", re.IGNORECASE)
_CLOSING = re.compile(r"[\s.$*)\]\\]*")  # the end of a sentence, of math or of bold text may follow


def final_answer(problem: Problem, completions: Sequence[str]) -> list[float]:
    """Return 1 for each completion that marks one answer, in one of the three forms, and ends with it, else 0.

    The answer need not be right, nor a number: give this a small weight next to a reward for correctness.
    """
    return [float(_ends_with_one_answer(text)) for text in completions]


def final_number(text: str) -> Fraction | None:
    """Return the number given as the final answer, exactly, or None if there is none.

    It is the content of the last mark of the strongest form. Without marks it follows "the answer is", and the last
    equals sign of that line; else it is the last number of the text. A mark without a number, or with several, is a
    wrong answer, whatever else the text holds.
    """
    for marks in (_boxed(text), _matched(_TAGS, text), _matched(_HASHES, text)):
        if marks:
            return parse_number(marks[-1].content)
    *_, after = _PHRASE.split(text)
    if after != text and (numbers := numbers_in(after.partition("\n")[0].rpartition("=")[2])):
        return numbers[0]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def numbers_in(text: str) -> list[Fraction]:
    """Return every number of a text, in order. Never raises: 3/0, 1e999999 and the like are left out."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    numbers = (_value(match) for match in _NUMBER.finditer(text))
    return [number for number in numbers if number is not None]


def parse_number(text: str) -> Fraction | None:
    """Return the only number of a short answer, or after its last equals sign; None if there is none or several.

    Several numbers are no answer, or a model could earn the reward by listing all candidates.
    """
    numbers = numbers_in(text.rpartition("=")[2])
    return numbers[0] if len(numbers) == 1 else None


@dataclass(frozen=True)
class _Marked:
    content: str
    end: int


def _ends_with_one_answer(text: str) -> bool:
    marks = [*_boxed(text), *_matched(_TAGS, text), *_matched(_HASHES, text)]
    return len(marks) == 1 and bool(marks[0].content.strip()) and bool(_CLOSING.fullmatch(text, marks[0].end))


def _matched(pattern: re.Pattern[str], text: str) -> list[_Marked]:
    return [_Marked(match[1], match.end()) for match in pattern.finditer(text)]


def _boxed(text: str) -> list[_Marked]:
    """Return the contents of closed boxes, in the order of their ends, in one pass. Braces nest."""
    boxes: list[_Marked] = []
    opened: list[re.Match[str]] = []
    for match in _BRACES.finditer(text):
        if match[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{":
                boxes.append(_Marked(text[start.end() : match.start()], match.end()))
        elif match[0].endswith("{") and match[0] != r"\{":
            opened.append(match)
    return boxes


def _value(match: re.Match[str]) -> Fraction | None:
    whole, top, bottom = _plain(match["whole"] or "0"), _plain(match["top"]), _plain(match["bottom"] or "1")
    if whole is None or top is None or not bottom:
        return None
    number = whole + top / bottom
    return -number if match["minus"] else number


def _plain(digits: str) -> Fraction | None:
    exponent = digits.lower().partition("e")[2].lstrip("+-")
    return None if len(digits) > _LONGEST or len(exponent) > 3 else Fraction(digits.replace(",", ""))
