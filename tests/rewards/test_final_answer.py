from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from grpo.rewards.final_answer import final_answer, final_number
from grpo.types import Problem

PROBLEM = Problem("How many clips?", "72")
PIECES = [
    "\\boxed{",
    "\\boxed ",
    "{",
    "}",
    "\\{",
    "\\}",
    "<answer>",
    "</answer>",
    "####",
    "72",
    " ",
    "\n",
    "answer is",
    "=",
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 + 24 is \\boxed{72}.", 72),
        ("\\boxed{1} no, \\boxed{72}", 72),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{\\text{about } 1{,}200}", 1200),
        ("{ \\boxed{72}", 72),
        ("\\boxed{ \\boxed{72}", 72),
        ("\\boxed{x \\in \\{72\\}}", 72),
        ("<answer>72 clips</answer> in 2 months", 72),
        ("<answer>1</answer> <answer>\n72\n</answer>", 72),
        ("48 + 24 = 72\n#### 72\n\nThat took 3 steps", 72),
        ("####-3", -3),
        ("#### $1,080", 1080),
        ("#### Step 3\nThe answer is 72.", 72),
        ("#### 1. Compute 2 x 24\n#### 2. Sum up 3 terms\nThe answer is 72.", 72),
        ("#### 1) **Compute** 2 x 24\nThe answer is 72.", 72),
        ("#### 72. \n1 year", 72),
        ("#### 1.5 hours", Fraction(3, 2)),
        ("#### 120. So it is", 120),
        ("The answer is 72 clips in 2 months.", 72),
        ("The answer is: **72**", 72),
        ("Final Answer: $72", 72),
        ("The answer is 1. No: the answer is 72", 72),
        ("The answer is\n\n72", 72),
        ("The answer is 48 + 24 = 72.", 72),
        ("Answer: 48 + 24 = 72 clips", 72),
        ("So, the answer is 5 x 4 = $20.", 20),
        ("The answer is 12 - 5 = 7.", 7),
        ("The answer is 25% of 80 = 20", 20),
        ("The answer is 48 + 24 = 72.\n72 = 6 x 12", 72),
        ("The answer is – 3.", -3),
        ("#### –3", -3),
        ("48 and 24 make 72 clips", 72),
        ("it is \\boxed{72", 72),
        ("<answer>72", 72),
    ],
)
def test_the_final_answer_is_found(text, number):
    assert final_number(text) == number


def test_the_stronger_mark_wins():
    text = "The answer is 1"
    for number, mark in ((2, "#### {}"), (3, "<answer>{}</answer>"), (4, "\\boxed{{{}}}")):
        text = f"{mark.format(number)}\n{text}"
        assert final_number(text) == number
    assert final_number("5 \\boxed{4} 6") == 4


@pytest.mark.parametrize(
    "text",
    ["", "none", "\\boxed{} 72", "\\boxed{seventy-two} 72", "72 <answer>71 or 72</answer>", "72 \\boxed{24\\times3}"],
)
def test_no_final_answer(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "so \\boxed{72}",
        "so $\\boxed{72}$.\n",
        "so \\[ \\boxed{\\frac{3}{4}} \\]",
        "**\\boxed{72}**",
        "so <answer>72</answer>\n",
        "so\n#### 72",
        "\\boxed{x + 1}",
    ],
)
def test_a_completion_that_ends_with_one_marked_answer_earns_1(text):
    assert final_answer(PROBLEM, [text]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "The answer is 72.",
        "\\boxed{}",
        "<answer> </answer>",
        "\\boxed{72",
        "\\boxed{71} or \\boxed{72}",
        "\\boxed{\\boxed{72}}",
        "\\boxed{72}\n#### 72",
        "<answer>\\boxed{72}</answer>",
        "\\boxed{72} clips, I think",
        "#### 72\nThat took 3 steps",
        "#### Step 72",
        "#### 1. Compute\n72",
    ],
)
def test_anything_else_earns_0(text):
    assert final_answer(PROBLEM, [text]) == [0.0]


def test_scores_come_in_the_order_of_the_completions():
    assert final_answer(PROBLEM, ["\\boxed{1}", "1", "#### 1"]) == [1.0, 0.0, 1.0]


def test_no_text_makes_it_raise():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 20)))
        final_number(text)
        final_answer(PROBLEM, [text])


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "}", "<answer>", "</answer>", "####", "#### 1", "#### 1. ", "answer is ", "answer is =", "\\boxed{1}"],
)
def test_a_long_text_is_read_in_linear_time(piece):
    text = piece * (50_000 // len(piece))
    start = time.process_time()
    final_number(text)
    final_answer(PROBLEM, [text])
    assert time.process_time() - start < 2
