from __future__ import annotations

import pytest

from grpo.environments import Message
from grpo.errors import ConfigError
from grpo.tasks.calculator import KINDS, Calculator
from grpo.types import Problem

PROBLEM = Problem("What is 17 less than 61?", "44")


@pytest.fixture
def episode():
    return Calculator().environment(PROBLEM, seed=0)


async def said(episode, text):
    return await episode.reply(Message("assistant", text))


async def test_an_episode_opens_with_an_example_and_ends_with_the_question(episode):
    opening = await episode.begin()
    roles = [message.role for message in opening.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert opening.messages[2].content == "calc(12*3)"
    assert opening.messages[-1].content == "What is 17 less than 61? Use the calculator."


@pytest.mark.parametrize(
    ("call", "result", "right"),
    [
        ("calc(61-17)", "44", True),
        (" calc( 61 - 17 ) ", "44", True),
        ("calc(17-61)", "-44", False),
        ("calc(6*7)", "42", False),
    ],
)
async def test_a_call_is_answered_and_known_to_be_right_or_wrong(episode, call, result, right):
    reply = await said(episode, call)
    assert not reply.done
    assert reply.messages == (Message("user", result),)
    assert reply.metrics == {"tool_calls": 1, "tool_errors": False, "right_calls": right}


@pytest.mark.parametrize(
    "call", ["calc(61-17", "calc((61-17))", "calc(61/17)", "calc()", "calc(1-2) is", "calc(9999999-1)"]
)
async def test_a_call_that_can_not_be_read_is_an_error_for_the_policy_to_see(episode, call):
    reply = await said(episode, call)
    assert (reply.done, reply.messages[0].content) == (False, "error")
    assert reply.metrics == {"tool_calls": 1, "tool_errors": True, "right_calls": False}


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("44", 1.0), (" 44\n", 1.0), ("-44", 0.0), ("44 45", 0.0), ("44.", 0.0), ("", 0.0), ("9" * 5000, 0.0)],
)
async def test_whatever_else_it_says_is_its_answer(episode, answer, reward):
    reply = await said(episode, answer)
    assert (reply.done, reply.reward) == (True, reward)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_asks_for_the_number_that_is_its_answer(kind):
    task = Calculator(kinds=[kind], per_kind=40)
    for problem in task.problems("train"):
        words = problem.question.strip("?").replace("the product of", "").replace(" and ", " times ").split()
        a, b, how = int(words[2]), int(words[-1]), words[3]
        expected = {"times": a * b, "plus": a + b, "more": a + b, "minus": a - b, "less": b - a}[how]
        assert int(problem.answer) == expected > 0


def test_held_out_problems_are_no_training_problems():
    task = Calculator(per_kind=100)
    train, held_out = ({problem.question for problem in task.problems(split)} for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (6 * 75, 6 * 25)
    assert train.isdisjoint(held_out)


def test_problems_follow_from_the_seed():
    first, same, other = (Calculator(seed=seed).problems("train") for seed in (1, 1, 2))
    assert first == same != other


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"^task\.args\.kinds: \['roots'\] unknown; there are \['times', "):
        Calculator(kinds=["roots"])
