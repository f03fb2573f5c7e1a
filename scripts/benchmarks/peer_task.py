"""A task whose answers have very different lengths."""

from __future__ import annotations

import numpy as np

from grpo.tasks.sorting import ALPHABET, Sorting
from grpo.types import Problem

MEAN_TOKENS, MOST_TOKENS = 32, 128


class Ragged(Sorting):
    """A model that learnt the demonstrations says letters by chance, and stops by chance at any of them alike.

    The reward is the share of letters that the prompt has: it differs within nearly every group, and says little of
    the length.
    """

    def score(self, problem: Problem, completion: str) -> float:
        return sum(letter in problem.question for letter in completion) / max(1, len(completion))

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> str:
        """So many letters that they are, with the end of the sequence, `MEAN_TOKENS` tokens on average."""
        letters = min(int(rng.geometric(1 / MEAN_TOKENS)), MOST_TOKENS) - 1
        return "".join(rng.choice(list(ALPHABET), size=letters))
