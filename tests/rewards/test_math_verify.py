from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo.errors import ConfigError, RewardTimeout
from grpo.rewards.process_pool import ProcessPool
from grpo.tasks.scoring import reward_function
from grpo.types import Problem


def build():
    function = reward_function("math_verify", task=None)  # imported here, where no time limit counts
    return lambda set_label, *args: function(*args)


@pytest.fixture(scope="module")
def math_verify():
    return reward_function("math_verify", task=None)


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


async def test_a_hang_is_a_timeout_and_not_a_wrong_answer():
    pool = ProcessPool(build, (), workers=1, timeout_s=2.0)
    await pool.start()
    assert await pool.call(Problem("?", "72"), ["\\boxed{72}"]) == [1.0]
    with pytest.raises(RewardTimeout):
        await pool.call(Problem("?", "72"), ["\\boxed{(1+x)^{100000}}"])
    await pool.close()


def test_it_runs_off_the_main_thread(math_verify):
    with ThreadPoolExecutor(1) as threads:  # where the library's own time-outs would raise
        assert threads.submit(math_verify, Problem("?", "72"), ["\\boxed{72}"]).result() == [1.0]


def test_an_answer_that_is_no_expression_is_an_error(math_verify):
    with pytest.raises(ValueError, match="can't parse the problem's answer ''"):
        math_verify(Problem("?", ""), ["72"])


def test_a_missing_library_names_the_line_to_type(monkeypatch):
    monkeypatch.delitem(sys.modules, "grpo.rewards.math_verify", raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"^reward\.functions: .*pip install -e '\.\[math\]'"):
        reward_function("math_verify", task=None)
