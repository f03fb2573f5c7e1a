from __future__ import annotations

import re

import pytest

from grpo.errors import ConfigError
from grpo.tasks.quiz import KINDS, Quiz
from grpo.types import Problem

SPLITS = ("train", "held_out")


def by_kind(problems):
    words = {"What is": "sum", "largest": "largest", "smallest": "smallest", "legs": "legs"}
    return [next(kind for word, kind in words.items() if word in problem.question) for problem in problems]


def test_every_kind_has_its_share_in_both_splits():
    task = Quiz(per_kind=40, held_out_share=0.25)
    for split, count in (("train", 30), ("held_out", 10)):
        kinds = by_kind(task.problems(split))
        assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, count)
    assert set(by_kind(task.problems("held_out")[:20])) == set(KINDS)


def test_the_splits_share_no_question():
    questions = [problem.question for split in SPLITS for problem in Quiz().problems(split)]
    assert len(set(questions)) == len(questions) == 400


def test_the_seed_decides_and_problems_are_stable():
    task, again, other = Quiz(seed=3), Quiz(seed=3), Quiz(seed=4)
    for split in SPLITS:
        assert task.problems(split) == task.problems(split) == again.problems(split)
        assert task.problems(split) != other.problems(split)


def test_a_kind_gives_what_there_is():
    task = Quiz(kinds=["sum", "sum"], per_kind=1000)
    assert sum(len(task.problems(split)) for split in SPLITS) == 100


@pytest.mark.parametrize(
    ("kind", "solve"),
    [("sum", lambda numbers, _: sum(numbers)), ("largest", lambda n, _: max(n)), ("smallest", lambda n, _: min(n))],
)
def test_answers_are_right(kind, solve):
    for problem in Quiz(kinds=[kind]).problems("train"):
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert int(problem.answer) == solve(numbers, problem)


def test_legs_are_counted_right():
    answers = {p.question: p.answer for split in SPLITS for p in Quiz(["legs"], 1000).problems(split)}
    for question, answer in (("3 dogs", "12"), ("2 spiders", "16"), ("6 ants", "36"), ("5 birds", "10")):
        assert answers[f"How many legs do {question} have? Answer with just the number."] == answer


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("11", 1.0),
        (" 11.\n", 1.0),
        ("The answer is 11.", 1.0),
        ("4 + 7 = 11", 1.0),
        ("12", 0.0),
        ("-11", 0.0),
        ("111", 0.0),
        ("11.0", 0.0),
        ("eleven", 0.0),
        ("", 0.0),
        ("10, 11", 0.0),
        ("11 or 12", 0.0),
        ("4 + 7 = 10 = 11 or 12", 0.0),
        ("4 + 7 is 11", 0.0),
    ],
)
def test_one_number_and_the_right_one_is_rewarded(completion, reward):
    assert Quiz().score(Problem("What is 4 + 7?", "11"), completion) == reward


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"^task\.args\.kinds: 'wings' is not one of sum, largest, smallest, legs"):
        Quiz(kinds=["sum", "wings"])
