"""Short questions that a small chat model understands and mostly gets wrong, so that the reward can rise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import permutations, product

import numpy as np

from grpo.errors import ConfigError
from grpo.tasks.base import Split
from grpo.types import Problem

_LEGS = {
    2: ("birds", "chickens", "ducks", "geese", "owls", "people"),
    4: ("cats", "cows", "dogs", "elephants", "goats", "horses", "lions", "mice", "pigs", "rabbits", "sheep", "tigers"),
    6: ("ants", "bees", "beetles", "flies"),
    8: ("scorpions", "spiders"),
}
_INTEGER = re.compile(r"-?\d+")


def _sum() -> Iterator[tuple[str, int]]:
    for a, b in product(range(10), repeat=2):
        yield f"What is {a} + {b}?", a + b


def _largest() -> Iterator[tuple[str, int]]:
    for a, b, c in permutations(range(1, 21), 3):
        yield f"Which number is the largest: {a}, {b} or {c}?", max(a, b, c)


def _smallest() -> Iterator[tuple[str, int]]:
    for a, b, c in permutations(range(1, 21), 3):
        yield f"Which number is the smallest: {a}, {b} or {c}?", min(a, b, c)


def _legs() -> Iterator[tuple[str, int]]:
    for legs, count in product(_LEGS, range(2, 7)):
        for animals in _LEGS[legs]:
            yield f"How many legs do {count} {animals} have?", count * legs


KINDS = {"sum": _sum, "largest": _largest, "smallest": _smallest, "legs": _legs}


class Quiz:
    """Up to `per_kind` problems of each of `kinds` (sum, largest, smallest, legs), drawn by `seed`.

    The fraction `held_out_share` of each kind is held out. The reward is 1 if the right number is the only one in the
    answer, or the only one after its last equals sign; other words do not matter. Listing guesses earns nothing.
    """

    def __init__(
        self,
        kinds: Sequence[str] = tuple(KINDS),
        per_kind: int = 100,
        instruction: str = "Answer with just the number.",
        held_out_share: float = 0.25,
        seed: int = 0,
    ) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise ConfigError(f"{sorted(unknown)[0]!r} is not one of {', '.join(KINDS)}", key="task.args.kinds")
        rng = np.random.default_rng(seed)
        self._splits: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        for kind in dict.fromkeys(kinds):
            pool = [Problem(f"{question} {instruction}", str(answer)) for question, answer in KINDS[kind]()]
            chosen = [pool[i] for i in rng.permutation(len(pool))[:per_kind]]
            held_out = round(len(chosen) * held_out_share)
            self._splits["held_out"] += chosen[:held_out]
            self._splits["train"] += chosen[held_out:]
        shuffled = rng.permutation(len(self._splits["held_out"]))  # mixes the kinds
        self._splits["held_out"] = [self._splits["held_out"][i] for i in shuffled]

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def score(self, problem: Problem, completion: str) -> float:
        result = completion.rpartition("=")[2]  # accepts "4 + 7 = 11"
        return float(_INTEGER.findall(result) == [problem.answer])
