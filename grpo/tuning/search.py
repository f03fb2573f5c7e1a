"""The smallest policy age, and then the smallest rollout concurrency, that keep the trainer from waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo.pacing import ticket_capacity
from grpo.tuning.outcome import Outcome

_CLOSE_ENOUGH = 1.15  # between a concurrency that is enough and one that is not: runs differ by more


@dataclass(frozen=True, order=True)
class Setting:
    """Of `buffer.max_policy_age` and `rollout.concurrency`."""

    max_policy_age: int
    concurrency: int

    @property
    def overrides(self) -> tuple[str, str]:
        return (f"rollout.concurrency={self.concurrency}", f"buffer.max_policy_age={self.max_policy_age}")

    def __str__(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Found:
    """`enough` says whether the target was reached; else the setting is the one with which the trainer waits least."""

    setting: Setting
    outcome: Outcome
    enough: bool


def search(measure: Callable[[Setting], Outcome], groups_per_step: int, ages: Sequence[int], target: float) -> Found:
    """`measure` says what a setting does; `target` is the share of its time that the trainer may wait.

    Younger samples are worth more than fewer rollouts: of the ages, tried in order, the first counts at which all the
    rollouts that can run at once are enough. Then their number is halved until it is not, and the border narrowed down.
    """
    tried: dict[Setting, Outcome] = {}

    def is_enough(setting: Setting) -> bool:
        if setting not in tried:
            tried[setting] = measure(setting)
        return tried[setting].trainer_wait <= target

    for age in ages:
        most = Setting(age, ticket_capacity(groups_per_step, age))
        if is_enough(most):
            found = _fewest(is_enough, most)
            return Found(found, tried[found], enough=True)
    best = min(tried, key=lambda setting: tried[setting].trainer_wait)
    return Found(best, tried[best], enough=False)


def _fewest(is_enough: Callable[[Setting], bool], enough: Setting) -> Setting:
    age, too_few = enough.max_policy_age, 0
    while enough.concurrency > 1 and too_few == 0:
        half = Setting(age, enough.concurrency // 2)
        if is_enough(half):
            enough = half
        else:
            too_few = half.concurrency
    while enough.concurrency > max(too_few + 1, too_few * _CLOSE_ENOUGH):
        middle = Setting(age, (enough.concurrency + too_few) // 2)
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle.concurrency
    return enough
