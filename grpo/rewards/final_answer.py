r"""Numbers as people and models write them, read exactly.

    -3   −3   1,234   1{,}234   1_234   1,000.50   .5   72.   1e6   1.5 \times 10^3   3/4   \frac{3}{4}   1 1/2
    \$18   USD18   50%   72 clips   72\text{ clips}

A percent sign is a unit like any other: 50% is 50. A plain space separates numbers: `1 000` is two of them. Roots
and multiples of pi are none: \sqrt{72}, 2\pi.
"""

# MERGED: r"""The final answer of a completion: finding it, and a format reward for giving exactly one.
#
# The forms that mark it, the strongest first: `\boxed{72}`, `<answer>72</answer>`, and `#### 72`.
#

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grpo.types import Problem

_LONGEST = 100  # characters, and 3 digits of an exponent: beyond it, reading a number takes time and memory
_TIMES_POWER_OF_TEN = r"(?<=[0-9])\s?(?:\\times|\\cdot|×)\s?10\^(?:\{(-?[0-9]{1,3})\}|([0-9])(?![0-9]))"
# Rewritten one after another, before the numbers are looked for.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"\\!", ""),  # takes a space back: 1,\!234
        (r"\*\*", " "),  # bold print
        (r"\{,\}", ","),
        (r"(?<=[0-9])(?:\\,|\\?_|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),
        (_TIMES_POWER_OF_TEN, r"e\1\2"),
        (r"\s?(?:\\sqrt\s?\{[^{}]{1,100}\}|\\sqrt|\\pi(?![A-Za-z])|[√π])\s?", "_"),  # hides the digits beside it
        (r"-\\?[$€£¥]\s?", "-"),
        (r"\\?[$€£¥]", " "),
        (r"^\s*-\s+", "-"),  # with a space it is a sign at the start, and a dash elsewhere
        (r"(?<=[0-9])\\[dt]?frac", r" \\frac"),
        (r"\\[dt]?frac\s?\{([^{}]{1,100})\}\s?\{([^{}]{1,100})\}", r"\1/\2"),
        (r"\\[dt]?frac\s?([0-9])\s?([0-9])", r"\1/\2"),
        (r"(?<=[A-Za-z])\}?\^\{?[23]\}?", " "),  # the exponent of a unit
        (r"\\[A-Za-z]++|(?<![A-Za-z])(?:USD|EUR|GBP|or|and|to)(?=[0-9])", " "),  # would hide the digits glued to it
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


def numbers_in(text: str) -> list[Fraction]:
    """Every number of a text, in order. Never raises; what is no number, such as 3/0 or 1e999999, is left out."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found = (_value(match) for match in _NUMBER.finditer(text))
    return [number for number in found if number is not None]


def parse_number(text: str) -> Fraction | None:
    """The one number of a short answer, or of what stands after its last equals sign; None if it has none or several.

    Several are no answer: a model must not earn the reward by naming all the candidates.
    """
    numbers = numbers_in(text.rpartition("=")[2])
    return numbers[0] if len(numbers) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    whole, top, bottom = _plain(match["whole"] or "0"), _plain(match["top"]), _plain(match["bottom"] or "1")
    if whole is None or top is None or not bottom:
        return None
    number = whole + top / bottom
    return -number if match["minus"] else number


def _plain(digits: str) -> Fraction | None:
    exponent = digits.lower().partition("e")[2].lstrip("+-")
    return None if len(digits) > _LONGEST or len(exponent) > 3 else Fraction(digits.replace(",", ""))


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
