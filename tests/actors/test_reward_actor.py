from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest

from grpo.actors.reward import Reward
from grpo.config.algorithm import RewardConfig, TaskConfig
from grpo.errors import ConfigError, RewardCrash, RewardError, RewardInvalid, RewardMemory, RewardTimeout
from grpo.rewards import REWARDS

FINE = {"timeout_s": 60.0, "memory_gb": 0.5, "workers": 1}
HASTY = {**FINE, "timeout_s": 0.5}


HERE = "tests.actors.reward_functions"
FAILURES = f"{HERE}:by_the_first_text"


@pytest.fixture
async def make_reward(config):
    made = []

    async def make(functions, settings=FINE, task=None):
        reward = Reward(replace(config, reward=RewardConfig(functions, **settings), task=task or config.task))
        made.append(reward)
        await reward.setup()
        return reward

    yield make
    for reward in made:
        await reward.close()


async def test_the_tasks_own_scoring_is_the_default(config, prompt, answers):
    reward = Reward(config)
    await reward.setup()
    scores = await reward.score(prompt, answers("abc", "cab"))
    assert scores.rewards == (1.0, 0.0)
    assert scores.parts == {"task": (1.0, 0.0)}
    await reward.close()


async def test_rewards_are_the_weighted_sum_of_several_functions(make_reward, prompt, answers):
    reward = await make_reward({"task": 1.0, "thinking": 0.5, f"{HERE}:lengths": -0.1})
    scores = await reward.score(prompt, answers("abc", "<think>a</think>bc", ""))
    assert scores.parts == {
        "task": (1.0, 0.0, 0.0),
        "thinking": (0.0, 1.0, 0.0),
        f"{HERE}:lengths": (3.0, 18.0, 0.0),
    }
    assert scores.rewards == pytest.approx((1 - 0.3, 0.5 - 1.8, 0.0))


async def test_every_reward_can_be_named(make_reward):
    await make_reward(dict.fromkeys(REWARDS, 1.0))


async def test_texts_hold_no_special_tokens(make_reward, prompt, answers, make_completion, tokenizer):
    reward = await make_reward({"task": 1.0})
    padded = make_completion([0, *tokenizer.encode("abc"), 1, 0])
    scores = await reward.score(prompt, [*answers("a b, c", ""), padded], "texts")
    assert (scores.texts, scores.tokens) == (("a b, c", "", "abc"), "")


async def test_texts_and_tokens_come_only_where_they_are_asked_for(make_reward, prompt, answers, tokenizer):
    reward = await make_reward({"task": 1.0})
    one, two = answers("ab", "c")
    one = replace(one, logprobs=np.array([-0.12345, 0.0, -np.inf], np.float32), versions=((3, 1), (4, 2)))
    bare = await reward.score(prompt, [one, two])
    assert (bare.texts, bare.tokens) == ((), "")
    scores = await reward.score(prompt, [one, two], "tokens")
    assert scores.texts == ("ab", "c")
    assert json.loads(scores.tokens) == [
        [["a", -0.1235, 3], ["b", 0.0, 4], ["<eos>", None, 4]],
        [["c", -2.0, 0], ["<eos>", -2.0, 0]],
    ]
    assert pickle.loads(pickle.dumps(scores)) == scores


async def test_any_numbers_become_floats_and_functions_run_elsewhere(make_reward, prompt, answers):
    reward = await make_reward({f"{HERE}:numpy_halves": 1.0, f"{HERE}:processes": 1.0})
    scores = await reward.score(prompt, answers("abc", "cab"))
    assert [type(score) for score in scores.rewards] == [float, float]
    (pid, _) = scores.parts[f"{HERE}:processes"]
    assert pid != os.getpid()


async def test_a_function_may_use_processes(make_reward, prompt, answers):
    reward = await make_reward({f"{HERE}:needs_no_judge": 1.0})
    assert (await reward.score(prompt, answers("ab", "c"))).rewards == (2.0, 1.0)


@pytest.mark.parametrize(
    ("text", "kind", "complaint"),
    [
        ("b", RewardCrash, ": its process died with exit code 1"),
        ("c", RewardCrash, ": its process died with signal 11 (Segmentation fault)"),
        ("d", RewardMemory, " asked for more memory than reward.memory_gb allows"),
        ("e", RewardError, " raised KeyError: 'gold'"),
        ("f", RewardInvalid, " returned (0.0, nan); rewards must be finite"),
        ("g", RewardInvalid, " returned (0.0, -inf); rewards must be finite"),
        ("h", RewardInvalid, " returned 1 scores for 2 completions"),
        ("i", RewardError, " raised ValueError: could not convert string to float: 'good'"),
        ("j", RewardError, " raised TypeError: 'NoneType' object is not iterable"),
        ("k", RewardError, " raised SystemExit: 2"),
        ("l", RewardTimeout, ": 7: no judge"),
    ],
)
async def test_a_failure_has_its_type_names_reward_and_prompt_and_is_followed_by_a_good_call(
    failing, prompt, answers, text, kind, complaint
):
    with pytest.raises(RewardError) as raised:
        await failing.score(prompt, answers(text, "abc"))
    assert type(raised.value) is kind
    assert str(raised.value) == f"reward {FAILURES!r} on prompt 'cab>'{complaint}"
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert (type(arrived), str(arrived)) == (kind, str(raised.value))
    assert (await failing.score(prompt, answers("x", "abc"))).rewards == (1.0, 2.0)


@pytest.fixture
async def failing(make_reward):
    return await make_reward({"task": 1.0, FAILURES: 1.0})


async def test_a_hang_is_a_timeout_that_names_the_function(make_reward, prompt, answers):
    reward = await make_reward({"task": 1.0, FAILURES: 1.0}, HASTY)
    with pytest.raises(RewardTimeout) as raised:
        await reward.score(prompt, answers("a", "abc"))
    assert str(raised.value) == f"reward {FAILURES!r} on prompt 'cab>': took longer than 0.5 s and was killed"
    assert (await reward.score(prompt, answers("x", "abc"))).rewards == (1.0, 2.0)


async def test_the_traceback_of_user_code_is_kept_and_a_long_question_is_cut(make_reward, prompt, answers):
    reward = await make_reward({FAILURES: 1.0})
    long = replace(prompt, problem=replace(prompt.problem, question="long " * 100))
    with pytest.raises(RewardError) as raised:
        await reward.score(long, answers("e", "abc"))
    assert 'raise KeyError("gold")' in raised.value.__notes__[0]
    assert len(str(raised.value)) < 200


async def test_scoring_does_not_hold_up_the_event_loop_nor_another_group(make_reward, prompt, answers):
    reward = await make_reward({"task": 1.0, FAILURES: 1.0}, {**FINE, "workers": 2})
    hanging = asyncio.create_task(reward.score(prompt, answers("a", "abc")))
    for _ in range(3):
        assert (await reward.score(prompt, answers("x", "abc"))).rewards == (1.0, 2.0)
    assert not hanging.done()
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_function_in_a_file_that_only_this_process_finds(make_reward, prompt, answers, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(problem, texts):\n    return [1 / (1 + len(t)) for t in texts]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    reward = await make_reward({"my_rewards.brevity": 0.5})
    assert (await reward.score(prompt, answers("a", "abc"))).rewards == (0.25, 0.125)
    assert "my_rewards" not in sys.modules


@pytest.mark.parametrize("name", ["grpo.rewards:nothing_like_it", "no.such.module:f", "unknown", "math:pi"])
async def test_setup_raises_for_an_unknown_function(make_reward, name):
    with pytest.raises(ConfigError, match=r"^reward\.functions: "):
        await make_reward({name: 1.0})


async def test_setup_raises_for_a_task_that_can_not_be_made_and_makes_none_that_is_not_needed(make_reward):
    broken = TaskConfig("grpo.tasks.sorting:Sorting", {"max_letters": 100})
    with pytest.raises(ConfigError, match=r"^task\.args: "):
        await make_reward({"task": 1.0}, task=broken)
    await make_reward({"thinking": 1.0}, task=broken)
