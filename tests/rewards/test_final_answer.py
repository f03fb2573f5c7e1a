from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from grpo.rewards.final_answer import final_answer, final_number, numbers_in, parse_number
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


ALPHABET = [
    "0",
    "1",
    "12",
    "999",
    ".",
    ",",
    "-",
    "−",
    "/",
    "e",
    "E",
    "+",
    " ",
    "\n",
    "=",
    "%",
    "$",
    "\\$",
    "\\",
    "{",
    "}",
]
ALPHABET += [
    "\\frac",
    "\\frac{1}{2}",
    "\\boxed{",
    "\\sqrt",
    "\\pi",
    "\\times",
    "\\times 10^",
    "_",
    "–",
    "or",
    "USD",
    "^2",
    "**",
    "\\,",
    "{,}",
    "\u202f",
    "٣",
    "½",
    "x",
    "é",
    "\x00",
    "\ud800",
]
DIGIT_PIECES = [
    "1",
    "-",
    "- ",
    "1,",
    "111,",
    "1,111,1,",
    "1/",
    "1 1/",
    "1e1",
    "1.1",
    "\\frac{",
    "\\frac{1}{",
    "$",
    " ",
]
DIGIT_PIECES += ["1_", "1_111", "\\", "\\a", "\\sqrt", "\\sqrt{", "\\pi", " π ", "or", "USD", "1×10^", "1\\times 10^1"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("72.", "72"),
        ("72.0", "72"),
        ("72 clips", "72"),
        ("72kg", "72"),
        ("...72", "72"),
        ("**72**", "72"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("–3", "-3"),
        ("(-3)", "-3"),
        ("- 3", "-3"),
        ("- $3", "-3"),
        (" – 3", "-3"),
        ("$- 3$", "-3"),
        ("x = - 3", "-3"),
        ("+3", "3"),
        ("$1,000", "1000"),
        ("-$5", "-5"),
        ("$-5$", "-5"),
        ("-\\$5.50", "-11/2"),
        ("\\$18", "18"),
        ("US$72", "72"),
        ("USD72", "72"),
        ("\\textdollar72", "72"),
        ("\\text{Rs. }72", "72"),
        ("1,000.50", "2001/2"),
        ("109,200,000", "109200000"),
        ("1{,}234", "1234"),
        ("1,\\!234", "1234"),
        ("1\\,234", "1234"),
        ("1\u202f234", "1234"),
        ("1_234", "1234"),
        ("1\\_234\\_567", "1234567"),
        (".5", "1/2"),
        ("0.1", "1/10"),
        ("1e6", "1000000"),
        ("2.5E-1", "1/4"),
        ("1.08 \\times 10^3", "1080"),
        ("1.08\\times10^{3}", "1080"),
        ("25 × 10^{-2}", "1/4"),
        ("2 \\cdot 10^{−1}", "1/5"),
        ("3/4", "3/4"),
        ("3 / 4", "3/4"),
        ("-3/4", "-3/4"),
        ("\\frac{3}{4}", "3/4"),
        ("-\\dfrac{3}{4}", "-3/4"),
        ("\\frac34", "3/4"),
        ("1 1/2", "3/2"),
        ("-1\\frac{1}{2}", "-3/2"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("x = 5", "5"),
        ("2 + 3 = 5", "5"),
        ("\\boxed{72}", "72"),
        ("72 \\text{ m}^2", "72"),
        ("72\\text{ hours}", "72"),
        ("72\\mathrm{km}", "72"),
        ("\\sqrt{25} = 5", "5"),
    ],
)
def test_one_number_in_the_ways_it_is_written(text, number):
    assert parse_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "=",
        "5 =",
        "3/0",
        "1e999999999",
        "9" * 5000,
        "0." + "9" * 5000,
        "1.000.000",
        "v1.2.3",
        "H2O",
        "½",
        "1_0",
    ],
)
def test_what_is_no_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize("root", ["\\sqrt{72}", "\\sqrt 72", "\\sqrt72", "√72", "6\\sqrt{2}", "\\frac{\\sqrt{3}}{2}"])
def test_a_root_is_no_number(root):
    assert numbers_in(f"x is {root}.") == []


@pytest.mark.parametrize("multiple", ["2\\pi", "2 \\pi r", "2π", "\\pi/2", "\\frac{\\pi}{2}", "\\frac{2}{\\pi}"])
def test_a_multiple_of_pi_is_no_number(multiple):
    assert numbers_in(f"x is {multiple}.") == []


@pytest.mark.parametrize(
    "text", ["71 or 72", "1 000", "71,72", "10^2", "16 - 3", "16 – 3", "5-10", "5–10", "$9 - $4", "5$6", "2**3", "3 3"]
)
def test_several_numbers_are_no_answer(text):
    assert parse_number(text) is None
    assert len(numbers_in(text)) == 2


@pytest.mark.parametrize("text", ["24\\times3", "24\\cdot3", "18\\pm2", "18\\text{ or20}", "18and20", "18 to USD20"])
def test_what_is_glued_to_a_number_does_not_hide_it(text):
    assert parse_number(text) is None
    assert len(numbers_in(text)) == 2


def test_a_dash_in_a_sentence_is_no_sign():
    assert numbers_in("It costs $9 - $4 – 2 and - 1 or -3") == [9, 4, 2, 1, -3]


def test_all_numbers_of_a_text_in_order():
    text = "She sold 48/2 = 24 clips for $1,250.50, -3 fewer than in 2020. 7-4 is 3."
    assert numbers_in(text) == [24, 24, Fraction("1250.5"), -3, 2020, 7, 4, 3]


def test_numbers_are_exact():
    assert parse_number("0.1") != Fraction(0.1)
    assert parse_number("0." + "3" * 40) != Fraction(1, 3)


def test_numbers_in_no_text_makes_it_raise():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 25)))
        for number in [*numbers_in(text), parse_number(text)]:
            assert number is None or isinstance(number, Fraction)


@pytest.mark.parametrize("piece", DIGIT_PIECES)
def test_numbers_in_a_long_text_are_read_in_linear_time(piece):
    start = time.process_time()
    numbers_in(piece * (60_000 // len(piece)) + "1111x")
    assert time.process_time() - start < 4
