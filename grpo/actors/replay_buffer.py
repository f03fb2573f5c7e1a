"""The actor that holds finished groups until a batch is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from grpo.actors.marks import batched, returns_payload
from grpo.types import Batch, BatchReport, Group, Ticket


class ReplayBuffer:
    """Groups in ticket order: within a window of W tickets, a finished group may overtake unfinished ones.

    With W = 1 a batch waits for its slowest group. The pacer bounds how many groups are here and how old they get, and
    the trainer asserts it; nothing is evicted. A replacement process receives its state by `restore`.

    Example:
        await buffer.add(Ticket(1), group)
        await buffer.skip(Ticket(0))                    # dropped: nothing waits for it any longer
        batch, report = await buffer.sample(1)
        assert report.tickets == (Ticket(1),)
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._groups: dict[Ticket, Group] = {}
        self._head = 0  # the oldest open serial: neither sampled nor skipped
        self._closed: set[int] = set()  # serials above `_head` that were sampled or skipped
        self._changed = asyncio.Condition()

    @batched
    async def add(self, ticket: Ticket, group: Group) -> None:
        """Add the ticket's group, unless it is closed already: after a restart the same call may come again."""
        async with self._changed:
            if not self._is_closed(ticket.serial):
                self._groups[ticket] = group
                self._changed.notify_all()

    async def skip(self, ticket: Ticket) -> None:
        """Stop waiting for the ticket's group, which was dropped."""
        async with self._changed:
            self._close(ticket)
            self._changed.notify_all()

    @returns_payload
    async def sample(self, count: int) -> tuple[Batch, BatchReport]:
        """Remove and return `count` groups. Waits until they are available; unblocked by `add` and `skip`."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._available(count)) == count)
            tickets = self._available(count)
            groups = [self._groups.pop(ticket) for ticket in tickets]
            for ticket in tickets:
                self._close(ticket)
        return Batch(groups), BatchReport(
            tickets=tuple(tickets),
            rewards=tuple(group.rewards for group in groups),
            lengths=tuple(tuple(completion.sampled_count for completion in g.completions) for g in groups),
            oldest_versions=tuple(group.oldest_version for group in groups),
            groups_waiting=len(self._groups),
        )

    @returns_payload
    async def state(self) -> tuple[list[tuple[int, Group]], None]:
        """Return all groups here, each with the serial of its ticket."""
        return [(ticket.serial, self._groups[ticket]) for ticket in sorted(self._groups)], None

    async def restore(
        self, awaited: Sequence[Ticket], next_serial: int, groups: Sequence[tuple[int, Group]] = ()
    ) -> None:
        """Replace the state: hold `groups`, and wait for the tickets `awaited` and all from `next_serial` on."""
        async with self._changed:
            self._groups = {Ticket(serial): group for serial, group in groups}
            open_serials = {ticket.serial for ticket in (*awaited, *self._groups)}
            self._head = min(open_serials, default=next_serial)
            self._closed = set(range(self._head, next_serial)) - open_serials
            self._changed.notify_all()

    def _available(self, count: int) -> list[Ticket]:
        """Return up to `count` tickets whose groups may leave now, in the order of admission.

        The window consists of the W tickets from the oldest open one on; it moves when that one leaves.
        """
        chosen: list[Ticket] = []
        closed, head = set(self._closed), self._head
        while len(chosen) < count:
            window = map(Ticket, range(head, head + self._window))
            ready = next((t for t in window if t in self._groups and t.serial not in closed), None)
            if ready is None:
                break
            chosen.append(ready)
            closed.add(ready.serial)
            while head in closed:
                head += 1
        return chosen

    def _is_closed(self, serial: int) -> bool:
        return serial < self._head or serial in self._closed

    def _close(self, ticket: Ticket) -> None:
        if self._is_closed(ticket.serial):
            return
        self._closed.add(ticket.serial)
        while self._head in self._closed:
            self._closed.remove(self._head)
            self._head += 1
