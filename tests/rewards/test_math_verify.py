from __future__ import annotations

import sys

import pytest

from grpo.actors.reward import reward_function
from grpo.types import ConfigError, Problem, RewardTimeout


@pytest.fixture(scope="module")
def math_verify():
    from grpo.rewards import math_verify as module

    yield module.math_verify
    module._equivalent.close()


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("\\frac{1}{2}", "so it is \\boxed{0.5}.", "\\boxed{0.51}"),
        ("0.5", "$\\frac{2}{4}$", "$\\frac{2}{5}$"),
        ("1,234", "The answer is 1234.", "The answer is 123."),
        ("x^2 + 2x + 1", "\\boxed{(x+1)^2}", "\\boxed{(x-1)^2}"),
        ("72", "\\boxed{72 \\text{ clips}}", ""),
    ],
)
def test_expressions_are_compared_by_their_value(math_verify, answer, right, wrong):
    assert math_verify(Problem("?", answer), [right, wrong]) == [1.0, 0.0]


def test_a_hang_is_an_error_that_says_so_and_not_a_wrong_answer(math_verify, monkeypatch):
    monkeypatch.setattr(sys.modules["grpo.rewards.math_verify"]._equivalent, "_timeout_s", 0.5)
    with pytest.raises(RewardTimeout, match="timeout"):
        math_verify(Problem("?", "72"), ["\\boxed{72}", "\\boxed{(1+x)^{100000}}"])


def test_an_answer_that_is_no_expression_is_an_error(math_verify):
    with pytest.raises(ValueError, match="no expression in the problem's answer ''"):
        math_verify(Problem("?", ""), ["72"])


@pytest.mark.parametrize("library", ["math_verify", "pebble"])
def test_a_missing_library_names_the_line_to_type(monkeypatch, library):
    for module in ("grpo.rewards.math_verify", "grpo.rewards.killable"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"^reward\.functions: .*pip install 'grpo\[math\]'"):
        reward_function("math_verify", task=None)
