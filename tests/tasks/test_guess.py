from __future__ import annotations

import numpy as np
import pytest

from grpo.environments import Message
from grpo.errors import ConfigError
from grpo.tasks.guess import Guess, GuessingGame
from grpo.types import Problem


@pytest.fixture
def task():
    return Guess(min_numbers=3, max_numbers=8)


async def replies(problem, *guesses):
    """Return what the game replies: a text, or the reward at its end."""
    game, found = GuessingGame(problem), []
    for guess in guesses:
        reply = await game.reply(Message("assistant", guess))
        found.append(reply.reward if reply.done else reply.messages[0].content)
    return found


def test_problems_are_all_pairs_of_numbers_and_secrets(task):
    splits = [[(p.question, p.answer) for p in task.problems(split)] for split in ("train", "held_out")]
    everything = [(f"{n}:", str(secret)) for n in range(3, 9) for secret in range(1, n + 1)]
    assert sorted(splits[0] + splits[1]) == sorted(everything)


@pytest.mark.parametrize(("smallest", "largest", "expected"), [(3, 8, {"5:"}), (8, 15, {"10:", "14:"})])
def test_every_fourth_number_is_held_out_with_all_of_its_secrets(smallest, largest, expected):
    task = Guess(smallest, largest)
    held_out = {problem.question for problem in task.problems("held_out")}
    assert held_out == expected
    assert held_out.isdisjoint(problem.question for problem in task.problems("train"))


def test_the_order_follows_from_the_seed(task):
    again, other = (Guess(min_numbers=3, max_numbers=8, seed=seed) for seed in (0, 1))
    assert task.problems("train") == again.problems("train") != other.problems("train")


@pytest.mark.parametrize("arguments", [{"min_numbers": 0}, {"min_numbers": 6, "max_numbers": 8}])
def test_too_few_numbers_are_an_error_that_names_the_key(arguments):
    with pytest.raises(ConfigError, match=r"^task\.args\.min_numbers: is \d; from min_numbers, at least 1, to"):
        Guess(**arguments)


async def test_a_game_begins_with_the_question(task):
    problem = task.problems("train")[0]
    opening = await task.environment(problem, seed=5).begin()
    assert (opening.messages, opening.tools) == ((Message("user", problem.question),), ())


async def test_a_reply_says_whether_the_secret_is_higher_or_lower():
    assert await replies(Problem("20:", "7"), "10", "5", "7") == ["<", ">", 1.0]
    assert await replies(Problem("20:", "7"), "10", "5", "6", "8", "9") == ["<", ">", ">", "<", 0.0]


@pytest.mark.parametrize("guess", ["", "seven", "7.", " 7", "-7", "7 8", "9" * 5000, "²"])
async def test_a_guess_that_is_no_number_costs_a_turn(guess):
    assert await replies(Problem("3:", "1"), guess, "1") == ["?", 1.0]
    assert await replies(Problem("3:", "1"), guess, guess) == ["?", 0.0]


@pytest.mark.parametrize("numbers", [1, 2, 3, 4, 7, 8, 15, 16, 31, 32])
async def test_who_bisects_always_wins_and_with_a_guess_less_not_always(numbers):
    used = []
    for secret in range(1, numbers + 1):
        game, low, high, count = GuessingGame(Problem(f"{numbers}:", str(secret))), 1, numbers, 0
        while low <= high:
            guess, count = (low + high) // 2, count + 1
            reply = await game.reply(Message("assistant", str(guess)))
            if reply.done:
                break
            low, high = (guess + 1, high) if reply.messages[0].content == ">" else (low, guess - 1)
        assert reply.reward == 1.0
        used.append(count)
    assert max(used) == numbers.bit_length()


async def test_a_demonstration_is_a_game_that_finds_the_secret(task):
    rng = np.random.default_rng(0)
    for problem in task.problems("train"):
        shown = task.demonstration(problem, rng)
        guesses, answers = shown[::2], shown[1::2]
        assert guesses[-1] == problem.answer
        assert all(1 <= int(guess) <= int(problem.question[:-1]) for guess in guesses)
        assert answers == [">" if int(problem.answer) > int(guess) else "<" for guess in guesses[:-1]]
