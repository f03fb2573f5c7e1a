"""Count what fails during a run, and end the run when it fails too often without making progress.

Every train step refills two budgets: deaths of processes (`recovery.max_restarts`) and groups that are dropped because
their reward failed (`recovery.max_dropped_groups`). The third budget is of groups that `filter.zero_variance` drops. It
is refilled whenever the filter has kept a batch of groups.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from grpo.config.operation import RecoveryConfig
from grpo.errors import DataError, GroupError, InfrastructureError, PayloadLost, ZeroVarianceGroup
from grpo.utils.aio import Signal

log = logging.getLogger(__name__)


@dataclass
class Death:
    """One death of an actor, with the seconds until its replacement served and until the next step was trained."""

    actor: str
    error: str
    at: float  # on time.perf_counter's clock
    back_s: float | None = None
    next_step_s: float | None = None


class Failures:
    """Failure counts and budgets of one run.

    `progress` is notified of every train step and evaluation; the watchdog waits for it. `warn` gets lines that people
    should see. `on_death` is called with every death, `on_recovery` when the replacement serves.

    Example:

        failures = Failures(config.recovery)
        failures.warn = display.warn
        death = failures.actor_died("trainer", error)  # raises `error` if the budget is used up
        failures.actor_recovered(death)
        failures.step_trained()  # refills the budgets
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self.deaths: list[Death] = []
        self.warn: Callable[[str], None] = log.warning
        self.on_death: Callable[[Death], None] = lambda death: None
        self.on_recovery: Callable[[Death], None] = lambda death: None
        self.progress = Signal()
        self._fatal: BaseException | None = None
        self._ended = Signal()
        self._config = config
        self._restarts_left, self._dropped_groups_left = config.max_restarts, config.max_dropped_groups
        self._kept = 0  # groups that passed the filter
        self._filtered: Counter[tuple[float, ...]] = Counter()  # rewards of dropped groups since the last kept batch

    @property
    def restarts(self) -> dict[str, int]:
        """Number of replacements of each actor."""
        return dict(Counter(death.actor for death in self.deaths))

    def end(self, error: BaseException) -> None:
        """End the run with this error."""
        self._fatal = self._fatal or error
        self._ended.notify()

    async def wait_fatal(self) -> NoReturn:
        """Raise the error that has to end the run, even while no task calls the actor that failed.

        Waits for: an error that no restart can fix.
        Unblocked by: `end`, which a service calls when the supervisor of a replica fails.
        Ends when: it raises, or is cancelled at the end of the run.
        """
        error = await self._ended.wait_for(lambda: self._fatal)
        assert error is not None
        raise error

    def actor_died(self, actor: str, error: InfrastructureError) -> Death:
        """Record a death. Raises the error when the budget was used up before."""
        if self._restarts_left == 0:
            limit = self._config.max_restarts
            message = f"{error}; no restarts left (recovery.max_restarts={limit} between two train steps)"
            raise type(error)(message) from error
        self._restarts_left -= 1
        self.warn(f"{error}; starting a replacement")
        death = Death(actor, str(error), time.perf_counter())
        self.deaths.append(death)
        self.on_death(death)
        return death

    def actor_recovered(self, death: Death) -> None:
        death.back_s = time.perf_counter() - death.at
        log.info("%s serves again after %.1f s", death.actor, death.back_s)
        self.on_recovery(death)

    def payload_lost(self, error: PayloadLost) -> None:
        """Warn of a lost group. It costs no budget: the death of the process or node that held it did."""
        self.warn(f"{error}; regenerating the group")

    def group_failed(self, error: GroupError) -> None:
        """Record a group that is dropped. Raises DataError when the budget was used up before."""
        if self._dropped_groups_left == 0:
            limit = self._config.max_dropped_groups
            message = f"{error}; too many dropped groups (recovery.max_dropped_groups={limit} between two train steps)"
            raise DataError(message) from error
        self._dropped_groups_left -= 1

    def group_kept(self, batch: int) -> None:
        """Record a group that passes the filter. Every `batch` of them refill the budget of filtered groups."""
        self._kept += 1
        if self._kept % batch == 0:
            self._filtered.clear()

    def group_filtered(self, error: ZeroVarianceGroup, limit: int) -> None:
        """Record a group that the filter drops. Raises DataError for the first one beyond `limit`.

        Only for the first: other rollouts may drop their groups before they are cancelled.
        """
        self._filtered[error.rollout.shaped_rewards] += 1
        if self._filtered.total() == limit + 1:
            raise DataError(
                f"filter.zero_variance: {_describe_filtered(self._filtered)}; the policy solves all or none of these "
                "prompts: use easier or harder ones, a larger rollout.group_size, or raise filter.max_dropped_batches"
            ) from None

    def step_trained(self) -> None:
        """Refill the budgets of deaths and of failed groups."""
        now = time.perf_counter()
        for death in self.deaths:
            if death.next_step_s is None:
                death.next_step_s = now - death.at
        self._restarts_left, self._dropped_groups_left = self._config.max_restarts, self._config.max_dropped_groups
        self.progress.notify()


def _describe_filtered(filtered: Counter[tuple[float, ...]]) -> str:
    """Return `dropped 320 zero-variance groups before a batch was full (310 with reward 0 throughout, ...)`."""
    equal: Counter[float] = Counter()
    for rewards, count in filtered.items():
        if len(set(rewards)) == 1:
            equal[rewards[0]] += count
    kinds = [f"{count} with reward {reward:g} throughout" for reward, count in equal.most_common(3)]
    listed = ", ".join(kinds) or "all completions masked"
    return f"dropped {filtered.total()} zero-variance groups before a batch was full ({listed})"
