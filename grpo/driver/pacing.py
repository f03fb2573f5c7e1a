"""Pace of the rollouts: tickets bound how stale groups can be, turns bound how many are generated at a time.

Tickets. At most (S + 1) * P tickets are out. A ticket returns when its group has been trained on and every generator
has loaded the new weights, or when the group was dropped. A group admitted at version v therefore has fewer than
(S + 1) * P groups ahead of it. Consumed in the order of admission, it is trained on at version v + S at the latest.
A group that is lost, with a process or with the run, keeps its ticket and is generated again from the same prompt:
its place in the order stays, and it only gets younger.

Turns. `rollout.concurrency` is a number, or "auto" for a controller that looks at the trainer's wait, as a fraction of
the time, over the last few steps:

    above `rollout.target_trainer_idle`     a quarter more rollouts; the old limit is remembered as too few
    below half of it                        an eighth fewer, unless that many are known to be too few
    a quarter more did not help             back to the old limit, no growth for a while: the generators are saturated

It starts with one batch's worth. Findings expire after a while, since lengths change as the policy learns.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo.telemetry.activity import waiting_for
from grpo.types import Ticket
from grpo.utils.aio import Signal

Stage = Literal["rollout", "buffered", "training"]

_WINDOW = 5  # steps between two decisions
_MEMORY = 20  # decisions until a finding expires
_HELPS = 0.2  # least fraction of the ideal speed-up that growth has to bring to be kept


class Concurrency:
    """A fixed number of rollouts: coroutines with a number below `limit` have their turn; there are `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self._changed = Signal()

    async def turn(self, number: int) -> None:
        """Wait until the coroutine of this number may make a group. Unblocked by a higher `limit`."""
        if number >= self.limit:
            with waiting_for("turn"):
                await self._changed.wait_for(lambda: number < self.limit)

    def step_trained(self, seconds: Mapping[str, float]) -> None:
        """Take note of the durations of one step's stages, `time/trainer_wait_s` among them."""


class AutoConcurrency(Concurrency):
    """Finds the smallest limit at which the trainer waits at most `target` of the time."""

    def __init__(self, most: int, start: int, target: float) -> None:
        super().__init__(most)
        self.limit = min(most, start)
        self._target = target
        self._steps, self._wait_s, self._total_s = 0, 0.0, 0.0
        self._decisions = 0
        self._too_few, self._too_few_until = 0, 0
        self._no_growth_until = 0
        self._grown_from: tuple[int, float] | None = None  # limit and wait before the last decision, if it was to grow

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
            self._set_limit(grown_from[0])
        else:
            self._grow(wait)

    def _helped(self, limit: int, wait_before: float, wait: float) -> bool:
        """Compare with the ideal, where groups take constant time and steps speed up as much as concurrency grows."""
        growth = self.limit / limit - 1
        return 1 - wait >= (1 - wait_before) * (1 + _HELPS * growth)

    def _grow(self, wait: float) -> None:
        self._too_few, self._too_few_until = self.limit, self._decisions + _MEMORY
        more = min(self.most, self.limit + max(1, self.limit // 4))
        if more > self.limit and self._decisions >= self._no_growth_until:
            self._grown_from = (self.limit, wait)
            self._set_limit(more)

    def _shrink(self) -> None:
        fewer = max(1, self.limit - max(1, self.limit // 8))
        if fewer > self._too_few or self._decisions >= self._too_few_until:
            self._set_limit(fewer)

    def _set_limit(self, limit: int) -> None:
        self.limit = limit
        self._changed.notify()


@dataclass
class _GroupState:
    """The group of a ticket that is out: the serial of its prompt, once it has one, and its stage."""

    prompt: int | None = None
    stage: Stage = "rollout"


class Pacer:
    """Hands out tickets and keeps the ledger: admitted = trained + dropped (by reason) + outstanding.

    Example:
        pacer = Pacer(capacity=2)
        first, second = await pacer.admit(), await pacer.admit()    # a third `admit` would wait
        pacer.requeue([first], "payload")                           # its group was lost: `admit` returns it again
        assert await pacer.admit() == first
        pacer.release([first])                                      # trained on, and the new weights are loaded
        pacer.drop(second, "reward_error")                          # will never be trained on
        assert (pacer.admitted, pacer.trained, pacer.outstanding) == (2, 1, 0)
    """

    def __init__(self, capacity: int, concurrency: Concurrency | None = None) -> None:
        self.capacity = capacity
        self.concurrency = concurrency or Concurrency(capacity)
        self.admitted = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()  # groups by reason
        self.requeued: Counter[str] = Counter()  # groups by what they were lost with
        self._out: dict[Ticket, _GroupState] = {}
        self._queue: deque[Ticket] = deque()  # lost groups, to be generated again
        self._available = asyncio.Semaphore(capacity)  # queued and free tickets

    @property
    def outstanding(self) -> int:
        return len(self._out)

    async def admit(self) -> Ticket:
        """Wait for the ticket of a lost group, else a free one; first come, first served.

        Unblocked by `release`, `drop` and `requeue`.
        """
        with waiting_for("ticket"):
            await self._available.acquire()
        if self._queue:
            return self._queue.popleft()
        ticket = Ticket(serial=self.admitted)
        self.admitted += 1
        self._out[ticket] = _GroupState()
        return ticket

    def prompt_of(self, ticket: Ticket) -> int | None:
        """Return the serial of the ticket's prompt, or None if it has none yet."""
        return self._out[ticket].prompt

    def ledger_entry(self, ticket: Ticket) -> tuple[int, int | None]:
        """Return the serials of the ticket and of its prompt, as `ledger.jsonl` writes them."""
        return ticket.serial, self._out[ticket].prompt

    def assign_prompt(self, ticket: Ticket, serial: int) -> None:
        self._out[ticket].prompt = serial

    def mark_buffered(self, ticket: Ticket) -> None:
        """Note that the group is in the replay buffer, unless a batch took it out before this was known."""
        group = self._out.get(ticket)
        if group is not None and group.stage == "rollout":
            group.stage = "buffered"

    def mark_training(self, tickets: Iterable[Ticket]) -> None:
        """Note that the groups left the replay buffer as a batch."""
        for ticket in tickets:
            self._out[ticket].stage = "training"

    def requeue(self, tickets: Iterable[Ticket], reason: str) -> None:
        """Queue the tickets of lost groups, oldest first: the next calls of `admit` return them."""
        for ticket in sorted(tickets):
            self._out[ticket].stage = "rollout"
            self._queue.append(ticket)
            self.requeued[reason] += 1
            self._available.release()

    def release(self, tickets: Iterable[Ticket]) -> None:
        """Take back tickets whose groups were trained on, once every generator has loaded the new weights."""
        for ticket in tickets:
            self._take_back(ticket)
            self.trained += 1

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Take back the ticket of a group that will never be trained on."""
        self._take_back(ticket)
        self.dropped[reason] += 1

    def in_stage(self, *stages: Stage) -> list[Ticket]:
        """Return the outstanding tickets in these stages, in the order of admission."""
        return sorted(ticket for ticket, group in self._out.items() if group.stage in stages)

    def state(self) -> dict[str, Any]:
        """Return the ledger, JSON-serializable."""
        return {
            "admitted": self.admitted,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "requeued": dict(self.requeued),
            "outstanding": [[ticket.serial, self._out[ticket].prompt] for ticket in sorted(self._out)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`. All its tickets are in stage "rollout": mark or requeue each of them next."""
        self.admitted, self.trained = state["admitted"], state["trained"]
        # Checkpoints of the version before this one call it "reissued".
        self.dropped, self.requeued = Counter(state["dropped"]), Counter(state.get("requeued", state.get("reissued")))
        self._out = {Ticket(serial): _GroupState(prompt) for serial, prompt in state["outstanding"]}
        self._available = asyncio.Semaphore(self.capacity - len(self._out))

    def _take_back(self, ticket: Ticket) -> None:
        del self._out[ticket]  # KeyError: a ticket that returns twice is a bug
        self._available.release()
