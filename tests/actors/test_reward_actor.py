from __future__ import annotations

import asyncio
import math
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest

from grpo.actors.reward import Reward, evaluate, reward_function
from grpo.config import RewardConfig
from grpo.rewards import REWARDS
from grpo.types import ConfigError, Problem, RewardError, RewardTimeout

released = threading.Event()


def lengths(problem, texts):
    return [len(text) for text in texts]


def numpy_halves(problem, texts):
    return np.full(len(texts), 0.5, dtype=np.float32)


def patient(problem, texts):
    if not released.wait(timeout=5):
        raise TimeoutError("the event loop did not get to release it")
    return [1.0] * len(texts)


def broken(problem, texts):
    raise KeyError("gold")


def missing_score(problem, texts):
    return [1.0] * (len(texts) - 1)


def not_a_number(problem, texts):
    return [0.0, math.nan]


def infinite(problem, texts):
    return [0.0, -math.inf]


def words(problem, texts):
    return ["good", "bad"]


def timed_out(problem, texts):
    raise RewardTimeout("timeout: took longer than 5 s and was killed")


class OddRewardError(RewardError):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


def odd(problem, texts):
    raise OddRewardError(7, "no judge")


def none_at_all(problem, texts):
    return None


@pytest.fixture
def make_reward(config):
    async def make(**functions):
        reward = Reward(replace(config, reward=RewardConfig(functions)))
        await reward.setup()
        return reward

    return make


async def test_the_tasks_own_scoring_is_the_default(config, prompt, answers):
    reward = Reward(config)
    await reward.setup()
    scores = await reward.score(prompt, answers("abc", "cab"))
    assert scores.rewards == (1.0, 0.0)
    assert scores.parts == {"task": (1.0, 0.0)}
    await reward.close()


async def test_rewards_are_the_weighted_sum_of_several_functions(make_reward, prompt, answers):
    reward = await make_reward(**{"task": 1.0, "thinking": 0.5, f"{__name__}:lengths": -0.1})
    scores = await reward.score(prompt, answers("abc", "<think>a</think>bc", ""))
    assert scores.parts == {
        "task": (1.0, 0.0, 0.0),
        "thinking": (0.0, 1.0, 0.0),
        f"{__name__}:lengths": (3.0, 18.0, 0.0),
    }
    assert scores.rewards == pytest.approx((1 - 0.3, 0.5 - 1.8, 0.0))


@pytest.mark.parametrize("name", REWARDS)
async def test_every_reward_can_be_named(make_reward, name):
    reward = await make_reward(**{name: 1.0})
    await reward.close()


async def test_texts_hold_no_special_tokens(make_reward, prompt, answers, make_completion, tokenizer):
    reward = await make_reward(task=1.0)
    padded = make_completion([0, *tokenizer.encode("abc"), 1, 0])
    scores = await reward.score(prompt, [*answers("a b, c", ""), padded])
    assert scores.texts == ("a b, c", "", "abc")


async def test_any_numbers_become_floats(make_reward, prompt, answers):
    reward = await make_reward(**{f"{__name__}:numpy_halves": 1.0})
    scores = await reward.score(prompt, answers("abc", "cab"))
    assert [type(score) for score in scores.rewards] == [float, float]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("broken", "raised KeyError: 'gold'"),
        ("missing_score", "returned 1 scores for 2 completions"),
        ("not_a_number", "must be finite"),
        ("infinite", "must be finite"),
        ("words", "raised ValueError"),
        ("none_at_all", "raised TypeError"),
        ("timed_out", "timed_out' on prompt 'cab>': timeout: took longer"),
        ("odd", "odd' on prompt 'cab>': 7: no judge"),
    ],
)
async def test_an_unusable_reward_is_an_error_that_names_it_and_the_prompt(
    make_reward, prompt, answers, function, complaint
):
    reward = await make_reward(**{"task": 1.0, f"{__name__}:{function}": 1.0})
    with pytest.raises(RewardError) as raised:
        await reward.score(prompt, answers("abc", "cab"))
    message = str(raised.value)
    assert complaint in message
    assert f"{__name__}:{function}" in message
    assert "cab>" in message
    assert "\n" not in message


@pytest.mark.parametrize(("function", "kind"), [(timed_out, RewardTimeout), (odd, RewardError), (broken, RewardError)])
def test_a_timeout_stays_one_also_when_it_is_sent_to_another_process(function, kind):
    with pytest.raises(RewardError) as raised:
        evaluate("x", function, Problem("cab>", "abc"), ["a"])
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert type(arrived) is kind
    assert str(arrived) == str(raised.value)


async def test_an_error_does_not_spoil_the_next_call(make_reward, prompt, answers):
    reward = await make_reward(**{f"{__name__}:missing_score": 1.0})
    for _ in range(2):
        with pytest.raises(RewardError):
            await reward.score(prompt, answers("abc", "cab"))


def test_the_cause_is_kept_and_a_long_question_is_cut():
    with pytest.raises(RewardError) as raised:
        evaluate("x", broken, Problem("long " * 100, ""), ["a"])
    assert isinstance(raised.value.__cause__, KeyError)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["grpo.rewards:nothing_like_it", "no.such.module:f", "unknown", "math:pi"])
def test_an_unknown_function_names_the_key(name):
    with pytest.raises(ConfigError, match=r"reward\.functions"):
        reward_function(name, task=None)


async def test_scoring_does_not_hold_up_the_event_loop(make_reward, prompt, answers):
    released.clear()
    slow, quick = await make_reward(**{f"{__name__}:patient": 1.0}), await make_reward(task=1.0)
    waiting = asyncio.create_task(slow.score(prompt, answers("abc")))
    await asyncio.sleep(0)
    assert (await quick.score(prompt, answers("abc"))).rewards == (1.0,)
    assert not waiting.done()
    released.set()
    assert (await waiting).rewards == (1.0,)
