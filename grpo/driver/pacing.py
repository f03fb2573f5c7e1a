"""How many rollout coroutines make groups at a time: a number, or as many as it takes (`rollout.concurrency=auto`).

The controller looks at the trainer's wait, as a share of the time, over the last few steps:

    above `rollout.target_trainer_idle`     a quarter more rollouts; what was there is remembered as too few
    below half of it                an eighth fewer, but never as few as were too few
    a quarter more did not help     back again, and no more growth for a while: the generators have enough to do

It begins with a batch's worth, and what it knows is forgotten after a while, since lengths change as the policy learns.
"""

# MERGED: Tickets: staleness bounded by construction, not by throwing work away. And the ledger of all work.
#
# At most (S + 1) * P tickets are out. A ticket comes back when its group has been trained on and the new weights are
# live in every generator (or when the group was dropped). A group admitted at version v therefore has fewer than
# (S + 1) * P groups ahead of it; consumed in the order of admission it is trained on at version v + S at the latest.
#
# A group that is lost, with a process or with the run, keeps its ticket and is made again, of the same
# prompt: its place
# in the order stays, and it only gets younger.
#

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo.telemetry.activity import waiting_for
from grpo.types import Ticket
from grpo.utils.aio import Signal

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


Stage = Literal["rollout", "buffered", "training"]


@dataclass
class _Work:
    """One ticket that is out: the serial of its prompt, once it has one, and how far its group is."""

    prompt: int | None = None
    stage: Stage = "rollout"


class Pacer:
    """Hands out tickets and keeps the ledger: admitted = trained + dropped (by reason) + outstanding."""

    def __init__(self, capacity: int, concurrency: Concurrency | None = None) -> None:
        self.capacity = capacity
        self.concurrency = concurrency or Concurrency(capacity)
        self.admitted = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self.requeued: Counter[str] = Counter()  # groups begun again, by what they were lost with
        self._out: dict[Ticket, _Work] = {}
        self._again: deque[Ticket] = deque()
        self._free = asyncio.Semaphore(capacity)  # places, and tickets to begin again

    @property
    def outstanding(self) -> int:
        return len(self._out)

    async def admit(self) -> Ticket:
        """Wait for a lost group to make again, or a free ticket, first come first served.

        Woken by `release`, `drop` and `requeue`.
        """
        with waiting_for("ticket"):
            await self._free.acquire()
        if self._again:
            return self._again.popleft()
        ticket = Ticket(serial=self.admitted)
        self.admitted += 1
        self._out[ticket] = _Work()
        return ticket

    def prompt_of(self, ticket: Ticket) -> int | None:
        """The serial of its prompt; None for one that has none yet."""
        return self._out[ticket].prompt

    def entry(self, ticket: Ticket) -> tuple[int, int | None]:
        """How the ledger names a piece of work: the serials of its ticket and of its prompt."""
        return ticket.serial, self._out[ticket].prompt

    def has_prompt(self, ticket: Ticket, serial: int) -> None:
        self._out[ticket].prompt = serial

    def is_buffered(self, ticket: Ticket) -> None:
        """Its group lies in the replay buffer, unless a batch took it before this was known."""
        work = self._out.get(ticket)
        if work is not None and work.stage == "rollout":
            work.stage = "buffered"

    def are_training(self, tickets: Iterable[Ticket]) -> None:
        """Their groups have left the replay buffer as a batch."""
        for ticket in tickets:
            self._out[ticket].stage = "training"

    def requeue(self, tickets: Iterable[Ticket], reason: str) -> None:
        """Their groups are lost: the next to ask for a ticket gets them, the oldest first."""
        for ticket in sorted(tickets):
            self._out[ticket].stage = "rollout"
            self._again.append(ticket)
            self.requeued[reason] += 1
            self._free.release()

    def release(self, tickets: Iterable[Ticket]) -> None:
        """Take back tickets whose groups were trained on and whose weights are live."""
        for ticket in tickets:
            self._take_back(ticket)
            self.trained += 1

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Take back the ticket of a group that will never be trained on."""
        self._take_back(ticket)
        self.dropped[reason] += 1

    def in_stage(self, *stages: Stage) -> list[Ticket]:
        """The tickets that are out and as far as that, in the order of admission."""
        return sorted(ticket for ticket, work in self._out.items() if work.stage in stages)

    def state(self) -> dict[str, Any]:
        """The ledger as JSON can hold it."""
        return {
            "admitted": self.admitted,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "requeued": dict(self.requeued),
            "outstanding": [[ticket.serial, self._out[ticket].prompt] for ticket in sorted(self._out)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Its tickets are out; which groups are there and which begin again is said next."""
        self.admitted, self.trained = state["admitted"], state["trained"]
        self.dropped, self.requeued = Counter(state["dropped"]), Counter(state["requeued"])
        self._out = {Ticket(serial): _Work(prompt) for serial, prompt in state["outstanding"]}
        self._free = asyncio.Semaphore(self.capacity - len(self._out))

    def _take_back(self, ticket: Ticket) -> None:
        del self._out[ticket]  # a ticket returned twice is a bug: KeyError
        self._free.release()
