"""A policy that says what a test wrote down, and environments to play in, on the tiny model's tokenizer."""

import numpy as np

from grpo.config.algorithm import EnvironmentConfig
from grpo.environments import Message, Opening, Reply
from grpo.environments.calls import UserCalls
from grpo.environments.player import Player
from grpo.environments.renderers import PlainRenderer
from grpo.models.tiny import character_tokenizer
from grpo.types import Completion, Problem, Prompt, SamplingParams

TOKENIZER = character_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPT = Prompt(7, Problem("q:", "a"), np.array(TOKENIZER.encode("q:")))


def ids(text):
    """Tokens of a text in which `.` stands for the end of a turn."""
    return [EOS if token == TOKENIZER.encode(".")[0] else token for token in TOKENIZER.encode(text)]


def turn(text, version=0):
    """A sampled turn, such as `12.`; without the period it was cut off. Log-probabilities tell tokens apart."""
    tokens = ids(text)
    finish = "stop" if tokens[-1] == EOS else "length"
    return Completion(np.array(tokens), np.array(tokens, np.float32) / -100, ((version, len(tokens)),), finish)


class Policy:
    """Samples the turns that a test wrote down for each episode, and remembers what it was asked."""

    def __init__(self, *episodes):
        self._episodes = [list(turns) for turns in episodes]
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    async def __call__(self, prompt_ids, params):
        self.prompts.append(prompt_ids.tolist())
        self.params.append(params)
        said = [self._episodes[params.first_sample + i].pop(0) for i in range(params.n)]
        return [each if isinstance(each, Completion) else turn(each) for each in said]


class Game:
    """Replies with what a test wrote down: texts, Replies, errors; the last one comes again and again."""

    def __init__(self, *replies):
        self._replies = list(replies or ["<"])
        self.heard: list[Message] = []
        self.closed = 0

    async def begin(self):
        return Opening((Message("user", "q:"),))

    async def reply(self, said):
        self.heard.append(said)
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, BaseException):
            raise reply
        return Reply((Message("user", reply),)) if isinstance(reply, str) else reply

    async def close(self):
        self.closed += 1


class ScoredGame(Game):
    async def score(self):
        return 0.25


async def play(games, policy, *, max_tokens=64, max_prompt_tokens=16, made=None, **settings):
    """Play a group, an episode for each game; returns (tokens of the opening, episodes)."""
    left, n = list(games), len(games)

    async def make(problem, seed):  # async: in the order of the episodes
        if made is not None:
            made.append((problem, seed))
        return left.pop(0)

    calls = UserCalls(threads=4)
    renderer, config = PlainRenderer(TOKENIZER, [EOS]), EnvironmentConfig(**settings)
    player = Player(make, renderer, config, calls, max_prompt_tokens=max_prompt_tokens)
    try:
        return await player.play(PROMPT, SamplingParams(n=n, max_tokens=max_tokens, seed=5), policy)
    finally:
        calls.close()


async def play_one(game, *turns, **settings):
    """Play one episode and return it."""
    _, [episode] = await play([game], Policy(turns), **settings)
    return episode
