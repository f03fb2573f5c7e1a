"""Tickets: staleness bounded by construction, not by throwing work away.

At most (S + 1) * P tickets are out. A ticket comes back when its group has been trained on and the new weights are
live in every generator (or when the group was dropped). A group admitted at version v therefore has fewer than
(S + 1) * P groups ahead of it; consumed in the order of admission it is trained on at version v + S at the latest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from grpo.types import Ticket


def ticket_capacity(groups_per_step: int, max_policy_age: int) -> int:
    """Groups that may be begun and not yet trained-and-published: (S + 1) * P."""
    return (max_policy_age + 1) * groups_per_step


def age_bound(groups_per_step: int, max_policy_age: int, window: int) -> int:
    """Oldest age a batch can hold, S + ceil((W - 1) / P): finished groups may overtake a straggler by W - 1 places."""
    return max_policy_age + -(-(window - 1) // groups_per_step)


class Pacer:
    """Hands out tickets and keeps the ledger: admitted = trained + dropped (by reason) + outstanding."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.admitted = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self._outstanding: set[Ticket] = set()
        self._free = asyncio.Semaphore(capacity)

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    async def admit(self) -> Ticket:
        """Wait for a free ticket, first come first served. Woken by `release` and `drop`."""
        await self._free.acquire()
        ticket = Ticket(serial=self.admitted)
        self.admitted += 1
        self._outstanding.add(ticket)
        return ticket

    def release(self, tickets: Iterable[Ticket]) -> None:
        """Take back tickets whose groups were trained on and whose weights are live."""
        for ticket in tickets:
            self._take_back(ticket)
            self.trained += 1

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Take back the ticket of a group that will never be trained on."""
        self._take_back(ticket)
        self.dropped[reason] += 1

    def _take_back(self, ticket: Ticket) -> None:
        self._outstanding.remove(ticket)  # a ticket returned twice is a bug: KeyError
        self._free.release()
