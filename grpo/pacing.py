"""Tickets: staleness bounded by construction, not by throwing work away. And the ledger of all work.

At most (S + 1) * P tickets are out. A ticket comes back when its group has been trained on and the new weights are
live in every generator (or when the group was dropped). A group admitted at version v therefore has fewer than
(S + 1) * P groups ahead of it; consumed in the order of admission it is trained on at version v + S at the latest.

A group that is lost, with a process or with the run, keeps its ticket and is made again, of the same prompt: its place
in the order stays, and it only gets younger.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo.concurrency import Concurrency
from grpo.types import Ticket
from grpo.waiting import waiting_for

Stage = Literal["rollout", "buffered", "training"]


def ticket_capacity(groups_per_step: int, max_policy_age: int) -> int:
    """Groups that may be begun and not yet trained-and-published: (S + 1) * P."""
    return (max_policy_age + 1) * groups_per_step


def age_bound(groups_per_step: int, max_policy_age: int, window: int) -> int:
    """Oldest age a batch can hold, S + ceil((W - 1) / P): finished groups may overtake a straggler by W - 1 places."""
    return max_policy_age + -(-(window - 1) // groups_per_step)


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
        self.reissued: Counter[str] = Counter()  # groups begun again, by what they were lost with
        self._out: dict[Ticket, _Work] = {}
        self._again: deque[Ticket] = deque()
        self._free = asyncio.Semaphore(capacity)  # places, and tickets to begin again

    @property
    def outstanding(self) -> int:
        return len(self._out)

    async def admit(self) -> Ticket:
        """Wait for a lost group to make again, or a free ticket, first come first served.

        Woken by `release`, `drop` and `begin_again`.
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

    def begin_again(self, tickets: Iterable[Ticket], reason: str) -> None:
        """Their groups are lost: the next to ask for a ticket gets them, the oldest first."""
        for ticket in sorted(tickets):
            self._out[ticket].stage = "rollout"
            self._again.append(ticket)
            self.reissued[reason] += 1
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
            "reissued": dict(self.reissued),
            "outstanding": [[ticket.serial, self._out[ticket].prompt] for ticket in sorted(self._out)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Its tickets are out; which groups are there and which begin again is said next."""
        self.admitted, self.trained = state["admitted"], state["trained"]
        self.dropped, self.reissued = Counter(state["dropped"]), Counter(state["reissued"])
        self._out = {Ticket(serial): _Work(prompt) for serial, prompt in state["outstanding"]}
        self._free = asyncio.Semaphore(self.capacity - len(self._out))

    def _take_back(self, ticket: Ticket) -> None:
        del self._out[ticket]  # a ticket returned twice is a bug: KeyError
        self._free.release()
