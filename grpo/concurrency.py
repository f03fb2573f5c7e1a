"""How many rollout coroutines make groups at a time: a number, or as many as it takes (`rollout.concurrency=auto`).

The controller looks at the trainer's wait, as a share of the time, over the last few steps:

    above `rollout.target_wait`     a quarter more rollouts; what was there is remembered as too few
    below half of it                an eighth fewer, but never as few as were too few
    a quarter more did not help     back again, and no more growth for a while: the generators have enough to do

It begins with a batch's worth, and what it knows is forgotten after a while, since lengths change as the policy learns.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpo.structured import Signal
from grpo.waiting import waiting_for

_WINDOW = 5  # steps between two decisions
_MEMORY = 20  # decisions for which a finding holds
_HELPS = 0.2  # of what growth would bring if there were nothing else to wait for; with less it is taken back


class Concurrency:
    """Coroutines with a number below `limit` have their turn; there are `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self._changed = Signal()

    async def turn(self, number: int) -> None:
        """Wait until the coroutine of this number may make a group."""
        if number >= self.limit:
            with waiting_for("turn"):
                await self._changed.wait_for(lambda: number < self.limit)

    def step_trained(self, seconds: Mapping[str, float]) -> None:
        """`seconds` are the stages of a step, `time/trainer_wait_s` among them."""

    def _set(self, limit: int) -> None:
        self.limit = limit
        self._changed.notify()


class AutoConcurrency(Concurrency):
    """Looks for the smallest limit with which the trainer waits for at most `target` of the time."""

    def __init__(self, most: int, start: int, target: float) -> None:
        super().__init__(most)
        self.limit = min(most, start)
        self._target = target
        self._steps, self._wait_s, self._total_s = 0, 0.0, 0.0
        self._decisions = 0
        self._too_few, self._too_few_until = 0, 0
        self._no_growth_until = 0
        self._grown_from: tuple[int, float] | None = None  # the limit before the last decision, and its wait

    def step_trained(self, seconds: Mapping[str, float]) -> None:
        self._steps += 1
        self._wait_s += seconds["time/trainer_wait_s"]
        self._total_s += sum(seconds.values())
        if self._steps == _WINDOW:
            self._decide(self._wait_s / self._total_s)
            self._steps, self._wait_s, self._total_s = 0, 0.0, 0.0

    def _decide(self, wait: float) -> None:
        self._decisions += 1
        grown_from, self._grown_from = self._grown_from, None
        if wait <= self._target / 2:
            self._shrink()
        elif wait <= self._target:
            return
        elif grown_from is not None and not self._helped(*grown_from, wait):
            self._no_growth_until = self._decisions + _MEMORY
            self._set(grown_from[0])
        else:
            self._grow(wait)

    def _helped(self, limit: int, wait_before: float, wait: float) -> bool:
        """Where every group takes its time and nothing else, so much more concurrency makes so many more steps."""
        growth = self.limit / limit - 1
        return 1 - wait >= (1 - wait_before) * (1 + _HELPS * growth)

    def _grow(self, wait: float) -> None:
        self._too_few, self._too_few_until = self.limit, self._decisions + _MEMORY
        more = min(self.most, self.limit + max(1, self.limit // 4))
        if more > self.limit and self._decisions >= self._no_growth_until:
            self._grown_from = (self.limit, wait)
            self._set(more)

    def _shrink(self) -> None:
        fewer = max(1, self.limit - max(1, self.limit // 8))
        if fewer > self._too_few or self._decisions >= self._too_few_until:
            self._set(fewer)
