from __future__ import annotations

import numpy as np
import pytest

from grpo.errors import ConfigError
from grpo.tasks.sorting import ALPHABET, Sorting
from grpo.types import Problem


@pytest.fixture
def task():
    return Sorting(min_letters=2, max_letters=4, train_size=200, held_out_size=50)


def test_the_splits_have_their_sizes_and_share_no_question(task):
    train, held_out = [[p.question for p in task.problems(split)] for split in ("train", "held_out")]
    assert (len(train), len(held_out)) == (200, 50)
    assert len({*train, *held_out}) == 250


def test_problems_follow_from_the_seed(task):
    again = Sorting(min_letters=2, max_letters=4, train_size=200, held_out_size=50)
    other = Sorting(min_letters=2, max_letters=4, train_size=200, held_out_size=50, seed=1)
    for split in ("train", "held_out"):
        assert task.problems(split) == again.problems(split)
        assert task.problems(split) != other.problems(split)
        assert task.problems(split) is task.problems(split)


def test_questions_are_letters_to_sort(task):
    lengths = set()
    for problem in task.problems("train"):
        letters, mark = problem.question[:-1], problem.question[-1]
        assert mark == ">"
        assert set(letters) <= set(ALPHABET)
        assert problem.answer == "".join(sorted(letters))
        lengths.add(len(letters))
    assert lengths == {2, 3, 4}


def test_every_string_there_is_may_be_asked_for():
    task = Sorting(min_letters=1, max_letters=1, train_size=10, held_out_size=2)
    assert {p.question for split in ("train", "held_out") for p in task.problems(split)} == {f"{c}>" for c in ALPHABET}


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_letters": 1, "min_letters": 1, "train_size": 11, "held_out_size": 2},  # would look for a 13th for ever
        {"min_letters": 4, "max_letters": 3},
        {"max_letters": 13},
    ],
)
def test_more_strings_than_there_are_is_an_error_that_names_the_key(arguments):
    with pytest.raises(ConfigError, match=r"^task\.args: there are \d+ strings"):
        Sorting(**arguments)


@pytest.mark.parametrize(
    ("completion", "reward"), [("abc", 1.0), ("cab", 0.0), ("", 0.0), ("abcd", 0.0), ("abc ", 0.0), ("ABC", 0.0)]
)
def test_only_the_sorted_string_earns_the_reward(task, completion, reward):
    assert task.score(Problem("cab>", "abc"), completion) == reward


def test_a_third_of_the_demonstrations_is_right(task):
    rng = np.random.default_rng(0)
    problem = Problem("cabd>", "abcd")
    shown = [task.demonstration(problem, rng) for _ in range(600)]
    assert set(shown) == {"abcd", "dcba", "cabd"}
    assert 150 < shown.count("abcd") < 250
