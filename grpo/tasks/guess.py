"""Guess the number, a game of several turns: to the question `23:` the policy guesses until it has found a secret."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from grpo.environments import Message, Opening, Reply
from grpo.errors import ConfigError
from grpo.tasks.base import Split
from grpo.types import Problem

HIGHER, LOWER, UNREADABLE = ">", "<", "?"
_NUMBER = re.compile(r"[0-9]{1,9}")


class Guess:
    """Secrets from 1 to `n`, with `n` from `min_numbers` to `max_numbers`; a problem is a pair of both.

    The reward is 1 if the secret is found within the guesses that bisection needs for `n` numbers, else 0. So a policy
    that bisects always earns 1. Every fourth `n` is held out, with all of its secrets: if only some of its secrets
    were, a policy would learn from the others which numbers never are one.

    Example: the secret is 5.

        10:   6<eos>   <   3<eos>   >   5<eos>
    """

    def __init__(self, min_numbers: int = 8, max_numbers: int = 11, seed: int = 0) -> None:
        numbers = range(min_numbers, max_numbers + 1)
        if min_numbers < 1 or len(numbers) < 4:
            raise ConfigError(
                f"is {min_numbers}; from min_numbers, at least 1, to max_numbers there must be 4 or more",
                key="task.args.min_numbers",
            )
        rng = np.random.default_rng(seed)
        self._splits: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        for i, n in enumerate(numbers):
            split: Split = "held_out" if i % 4 == 2 else "train"
            self._splits[split] += [Problem(f"{n}:", str(secret)) for secret in range(1, n + 1)]
        for problems in self._splits.values():
            rng.shuffle(problems)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def environment(self, problem: Problem, seed: int) -> GuessingGame:
        return GuessingGame(problem)

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> list[str]:
        """Return a game of a player who guesses at random, and half of the time forgets what it was told.

        A model trained on these knows how to play, but needs more guesses than bisection.
        """
        n, secret = int(problem.question[:-1]), int(problem.answer)
        low, high = 1, n
        game = []
        while True:
            guess = int(rng.integers(1, n + 1) if rng.random() < 0.5 else rng.integers(low, high + 1))
            game.append(str(guess))
            if guess == secret:
                return game
            game.append(HIGHER if secret > guess else LOWER)
            low, high = (max(low, guess + 1), high) if secret > guess else (low, min(high, guess - 1))


class GuessingGame:
    """One game. The reply to a guess says whether the secret is higher or lower."""

    def __init__(self, problem: Problem) -> None:
        self._question, self._secret = problem.question, int(problem.answer)
        self._left = int(problem.question[:-1]).bit_length()  # guesses that bisection needs: log2(n + 1), rounded up

    async def begin(self) -> Opening:
        return Opening((Message("user", self._question),))

    async def reply(self, said: Message) -> Reply:
        self._left -= 1
        guess = int(said.content) if _NUMBER.fullmatch(said.content) else None
        if guess == self._secret:
            return Reply(done=True, reward=1.0)
        answer = UNREADABLE if guess is None else HIGHER if self._secret > guess else LOWER
        return Reply((Message("user", answer),), done=self._left == 0)
