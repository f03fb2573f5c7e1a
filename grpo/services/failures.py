"""What failed during a run, and how much more of it is tolerated.

Two budgets, of actors that died and of groups whose reward failed. Every trained step fills both up again: a long run
may lose many actors, but one that fails again and again without getting anywhere ends. A third one is of groups that
`filter.zero_variance` drops; every batch's worth of groups that it lets pass fills that up.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from grpo.config.operation import RecoveryConfig
from grpo.errors import DataError, InfrastructureError, PayloadLost, RewardError, ZeroVarianceGroup
from grpo.utils.aio import Signal

log = logging.getLogger(__name__)
_FILTER_FIX = (
    "the policy answers always or never right: take easier or harder prompts, a larger rollout.group_size, or raise "
    "filter.max_dropped_batches"
)


@dataclass
class Death:
    """One actor that died: how long until its replacement served, and until the next step was trained, in seconds."""

    actor: str
    error: str
    at: float  # on time.perf_counter's clock
    back_s: float | None = None
    next_step_s: float | None = None


class Failures:
    """Counts failures and holds the budgets.

    `progress` tells of steps and evaluations; a watchdog waits for it. `warn` is called with what people should know,
    `on_death` and `on_return` with every actor that died, and again when its replacement serves.
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self.deaths: list[Death] = []
        self.warn: Callable[[str], None] = log.warning
        self.on_death: Callable[[Death], None] = lambda death: None
        self.on_return: Callable[[Death], None] = lambda death: None
        self.progress = Signal()
        self._fatal: BaseException | None = None
        self._ended = Signal()
        self._config = config
        self._passed = 0  # the filter
        self._filtered: Counter[tuple[float, ...]] = Counter()  # since the last batch that did, by their rewards
        self._restarts_left, self._data_failures_left = config.max_restarts, config.max_dropped_groups

    @property
    def restarts(self) -> dict[str, int]:
        """How often each actor was replaced."""
        return dict(Counter(death.actor for death in self.deaths))

    def end(self, error: BaseException) -> None:
        """Nothing can be done about this one."""
        self._fatal = self._fatal or error
        self._ended.notify()

    async def wait_fatal(self) -> NoReturn:
        """Raises the error that has to end the run, also when nobody happens to call the actor that has failed."""
        error = await self._ended.wait_for(lambda: self._fatal)
        assert error is not None
        raise error

    def actor_died(self, actor: str, error: InfrastructureError) -> Death:
        """Note it. Raises the error when the budget was spent before."""
        self._spend_restart(error)
        self.warn(f"{error}; another process takes its place")
        death = Death(actor, str(error), time.perf_counter())
        self.deaths.append(death)
        self.on_death(death)
        return death

    def payload_lost(self, error: PayloadLost) -> None:
        """Note what has to be made again. It costs no budget: the process or node that it went with did."""
        self.warn(f"{error}; made again")

    def actor_is_back(self, death: Death) -> None:
        death.back_s = time.perf_counter() - death.at
        log.info("%s is back after %.1f s", death.actor, death.back_s)
        self.on_return(death)

    def reward_failed(self, error: RewardError) -> None:
        """Note a group that is dropped. Raises DataError when the budget was spent before."""
        if self._data_failures_left == 0:
            limit = self._config.max_dropped_groups
            raise DataError(f"{error}; recovery.max_dropped_groups={limit} between two steps are spent") from error
        self._data_failures_left -= 1

    def group_kept(self, batch: int) -> None:
        """Note a group that the filter lets pass. Every `batch` of them fill up what may be dropped."""
        self._passed += 1
        if self._passed % batch == 0:
            self._filtered.clear()

    def group_filtered(self, error: ZeroVarianceGroup, limit: int) -> None:
        """Note a group that the filter drops. Raises DataError for the first beyond `limit` since the last batch.

        Other rollouts may drop theirs before they are cancelled: once is enough to say.
        """
        self._filtered[error.rollout.shaped_rewards] += 1
        if self._filtered.total() == limit + 1:
            seen = _seen(self._filtered)
            raise DataError(f"filter.zero_variance: {seen}, with no batch in between; {_FILTER_FIX}") from None

    def step_trained(self) -> None:
        """The budgets are full again."""
        now = time.perf_counter()
        for death in self.deaths:
            if death.next_step_s is None:
                death.next_step_s = now - death.at
        self._restarts_left, self._data_failures_left = self._config.max_restarts, self._config.max_dropped_groups
        self.progress.notify()

    def _spend_restart(self, error: InfrastructureError) -> None:
        if self._restarts_left == 0:
            limit = self._config.max_restarts
            raise type(error)(f"{error}; recovery.max_restarts={limit} between two steps are spent") from error
        self._restarts_left -= 1


def _seen(filtered: Counter[tuple[float, ...]]) -> str:
    """`320 groups with nothing to learn from (310 with reward 0 throughout, 10 with reward 1 throughout)`."""
    equal: Counter[float] = Counter()
    for rewards, count in filtered.items():
        if len(set(rewards)) == 1:
            equal[rewards[0]] += count
    kinds = [f"{count} with reward {reward:g} throughout" for reward, count in equal.most_common(3)]
    return f"{filtered.total()} groups with nothing to learn from ({', '.join(kinds) or 'all completions masked'})"
