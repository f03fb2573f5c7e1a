import sys

import pytest

from grpo.errors import ConfigError
from grpo.tasks.reasoning_gym import ReasoningGym


@pytest.fixture(scope="module")
def task():
    return ReasoningGym("gsm_symbolic", train_size=30, held_out_size=5)


def test_the_splits_share_no_question(task):
    train, held_out = ({problem.question for problem in task.problems(split)} for split in ("train", "held_out"))
    assert len(train) > 20
    assert len(held_out) == 5
    assert not train & held_out


def test_answers_are_scored_by_reasoning_gym_with_or_without_tags(task):
    problem = task.problems("train")[0]
    assert task.score(problem, problem.answer) == 1
    assert task.score(problem, f"so it is <answer> {problem.answer} </answer>.") == 1
    assert task.score(problem, "<answer>no idea</answer>") < 0.1


def test_another_data_set_with_settings():
    task = ReasoningGym("chain_sum", settings={"max_terms": 2}, train_size=5, held_out_size=2)
    problem = task.problems("held_out")[0]
    assert task.score(problem, problem.answer) == 1


@pytest.mark.parametrize("args", [{"dataset": "chess960"}, {"settings": {"colour": "blue"}}])
def test_what_reasoning_gym_refuses_is_a_clear_error(args):
    with pytest.raises(ConfigError, match=r"task\.args: reasoning-gym rejects"):
        ReasoningGym(**args)


def test_a_missing_package_names_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[reasoning-gym\]'"):
        ReasoningGym()
