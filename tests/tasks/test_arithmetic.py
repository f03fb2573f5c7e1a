import pytest

from grpo.errors import ConfigError
from grpo.tasks.arithmetic import Arithmetic
from grpo.types import Problem


def test_every_pair_appears_once_and_the_splits_share_none():
    task = Arithmetic(largest=9, operations="+*")
    train, held_out = (
        {problem.question for problem in task.problems("train")},
        {problem.question for problem in task.problems("held_out")},
    )
    assert len(train) + len(held_out) == 200
    assert len(held_out) == 20
    assert not train & held_out


def test_the_seed_decides_what_is_held_out():
    first, again, other = (Arithmetic(largest=9, seed=seed).problems("held_out") for seed in (0, 0, 1))
    assert list(first) == list(again)
    assert list(first) != list(other)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("12", 1), (" 12.", 1), ("5 + 7 = 12", 1), ("12 or 13", 0), ("-12", 0), ("twelve", 0), ("", 0), ("112", 0)],
)
def test_the_last_integer_counts(completion, reward):
    assert Arithmetic().score(Problem("5 + 7", "12"), completion) == reward


def test_negative_results_and_the_question_template():
    task = Arithmetic(largest=1, operations="-", question="{expression} = ?", held_out_share=0)
    problems = {problem.question: problem.answer for problem in task.problems("train")}
    assert problems["0 - 1 = ?"] == "-1"
    assert task.score(Problem("0 - 1 = ?", "-1"), "it is -1") == 1


def test_an_unknown_operation_is_refused():
    with pytest.raises(ConfigError, match=r"task\.args\.operations: '/' is not one of"):
        Arithmetic(operations="+/")
