from __future__ import annotations

import pytest

from grpo.rewards.thinking import thinking
from grpo.types import Problem

PROBLEM = Problem("2 + 2?", "4")


@pytest.mark.parametrize(
    "text",
    [
        "<think>two and two</think>4",
        "  <think>two\nand\ntwo</think>\n\n4\n",
        "<think>a < b</think> the answer is\n4",
        "<think>a</think>a",
    ],
)
def test_a_thought_and_an_answer_earn_1(text):
    assert thinking(PROBLEM, [text]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<think>two and two</think>",
        "<think>two and two</think> \n ",
        "<think></think>4",
        "<think> \n </think>4",
        "<think>two and two 4",
        "two and two</think>4",
        "so: <think>two and two</think>4",
        "<think>a</think><think>b</think>4",
        "<think>a<think>b</think>4",
        "<think>a</think>4</think>",
        "</think>a<think>4",
        "<THINK>a</THINK>4",
    ],
)
def test_anything_else_earns_0(text):
    assert thinking(PROBLEM, [text]) == [0.0]


def test_scores_come_in_the_order_of_the_completions():
    assert thinking(PROBLEM, ["<think>a</think>4", "4", "<think>b</think>5"]) == [1.0, 0.0, 1.0]
    assert thinking(PROBLEM, []) == []


@pytest.mark.parametrize("text", ["<think>" + " " * 50_000, "<think>" + "a " * 25_000, "<think>" * 5_000])
def test_a_long_thought_without_end_is_scored_at_once(text):
    assert thinking(PROBLEM, [text]) == [0.0]
