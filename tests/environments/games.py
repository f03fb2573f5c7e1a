"""Guessing games whose environments fail, and a generator that bisects."""

import asyncio
import math
import re
import threading
import time

import numpy as np

from grpo.environments import Message, Opening, Reply
from grpo.errors import EnvironmentTimeout
from grpo.models.tiny import character_tokenizer
from grpo.tasks.guess import Guess, GuessingGame
from grpo.types import Completion, GeneratorStats

TOKENIZER = character_tokenizer()
_TURN = re.compile(r"(\d+)\.([<>?])")


class Bisecting:
    """A generator that always wins: it reads the game so far from its prompt. Remembers its prompts as texts.

    With `stays_at` it never answers a prompt of so many turns.
    """

    def __init__(self, stays_at=None):
        self.version, self.prompts, self.waits = 0, [], asyncio.Event()
        self._stays_at = stays_at

    async def sample(self, prompt_ids, params):
        text = TOKENIZER.decode(np.where(prompt_ids == TOKENIZER.eos_token_id, TOKENIZER.encode(".")[0], prompt_ids))
        self.prompts.append(text)
        question, _, played = text.partition(":")
        turns = _TURN.findall(played)
        if len(turns) == self._stays_at:
            self.waits.set()
            await asyncio.Event().wait()
        low, high = 1, int(question)
        for guess, reply in turns:
            low, high = (int(guess) + 1, high) if reply == ">" else (low, int(guess) - 1)
        await asyncio.sleep(0)
        tokens = np.array([*TOKENIZER.encode(str((low + high) // 2)), TOKENIZER.eos_token_id])
        logprobs = np.full(len(tokens), -0.5, np.float32)
        return [Completion(tokens, logprobs, ((self.version, len(tokens)),), "stop") for _ in range(params.n)]

    async def update_weights(self, weights):
        self.version = weights.version
        return GeneratorStats(0.0, 0)


def _raising(error):
    async def method(*args):
        raise error

    return method


def _returning(value):
    async def method(*args):
        return value

    return method


FAILURES = {
    "environment_error": {"reply": _raising(KeyError("x"))},
    "environment_timeout": {"begin": _raising(EnvironmentTimeout("begin did not return"))},
    "environment_invalid": {"reply": _returning(Reply(reward=math.nan))},
    "too_long": {"begin": _returning(Opening((Message("user", "1" * 99),)))},
}


class FailingGuess(Guess):
    """Every `every`-th prompt's environment fails in this way."""

    def __init__(self, failure, every=1, **options):
        super().__init__(**options)
        self._failure, self._every = failure, every

    def environment(self, problem, seed):
        game = GuessingGame(problem)
        if seed % self._every == 0:
            for name, method in FAILURES[self._failure].items():
                setattr(game, name, method)
        return game


RELEASE = threading.Event()


class HangingGuess(Guess):
    """Replies hang in their threads until a test sets RELEASE."""

    def environment(self, problem, seed):
        return HangingGame(problem)


class HangingGame(GuessingGame):
    def reply(self, said):
        RELEASE.wait()
        return asyncio.run(super().reply(said))


class BlockingGuess(Guess):
    """Replies block the event loop."""

    def environment(self, problem, seed):
        return BlockingGame(problem)


class BlockingGame(GuessingGame):
    async def reply(self, said):
        time.sleep(0.2)  # noqa: ASYNC251
        return await super().reply(said)


class CountedGuess(Guess):
    """Counts the environments that are made and closed in this process."""

    made = closed = 0

    def environment(self, problem, seed):
        CountedGuess.made += 1
        game = GuessingGame(problem)
        game.close = self._close
        return game

    async def _close(self):
        CountedGuess.closed += 1
