"""What people see of the groups that the environment actor plays: texts, tokens and spans, of logged groups alone."""

import asyncio
import json

import numpy as np
import pytest

from grpo.actors.environment import EnvironmentHost
from grpo.config.algorithm import TaskConfig
from grpo.telemetry.recording import Recording, context_for
from grpo.types import Completion, Problem, Prompt, SamplingParams, TurnText


class Bisecting:
    """A generator that guesses 8, then 4, in all episodes."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    async def invoke(self, method, args):
        prompt_ids, params = args
        assert method == "sample"
        await asyncio.sleep(0)  # the other episode goes on
        guess = "8" if len(prompt_ids) == 3 else "4"
        token_ids = np.array([*self._tokenizer.encode(guess), self._tokenizer.eos_token_id])
        return [Completion(token_ids, np.full(2, -0.5, np.float32), ((7, 2),), "stop")] * params.n


@pytest.fixture
def play(config, tokenizer):
    config.task = TaskConfig("grpo.tasks.guess:Guess", {"min_numbers": 12, "max_numbers": 15})
    prompt = Prompt(3, Problem("15:", "4"), np.array(tokenizer.encode("15:")))

    async def play(detail):
        recording = Recording(on=True)
        host = EnvironmentHost(config)
        await host.setup()
        params = SamplingParams(n=2, max_tokens=20)
        playing = host.play(prompt, params, Bisecting(tokenizer), detail)
        _, report = await asyncio.create_task(playing, context=context_for(recording))
        await host.close()
        return report.scores, recording.drain(keep_recording=True).spans

    return play


async def test_a_logged_group_has_transcripts_tokens_and_a_lane_for_each_episode(play):
    scores, spans = await play("tokens")
    assert scores.texts == ("8\n| <\n4",) * 2
    assert scores.transcripts[0].turns == (TurnText("8", "<", 0.0, "stop", 2, 1), TurnText("4", "", 1.0, "stop", 2, 0))
    assert scores.transcripts[0].ended_by == "done"
    tokens = [["8", -0.5, 7], ["<eos>", -0.5, 7], ["<", None, None], ["4", -0.5, 7], ["<eos>", -0.5, 7]]
    assert json.loads(scores.tokens) == [tokens] * 2
    episodes = [span for span in spans if span.name == "episode"]
    assert len({span.lane for span in episodes}) == 2
    assert episodes[0].args["ended_by"] == "done"
    inside = [
        [each.name for each in spans if each.lane == span.lane and each.begin_s > span.begin_s] for span in episodes
    ]
    assert inside == [["reply", "turn", "reply"]] * 2


async def test_any_other_group_has_rewards_alone(play):
    scores, spans = await play("rewards")
    assert (scores.rewards, scores.texts, scores.tokens, scores.transcripts) == ((1.0, 1.0), (), "", ())
    assert spans == []
