"""Holds finished groups until a batch of them is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from grpo.actors.marks import batched, returns_payload
from grpo.types import Batch, BatchReport, Group, Ticket


class ReplayBuffer:
    """Groups leave in the order of their tickets; within a window of W places a finished one may overtake.

    With W = 1 a batch waits for its slowest group. The pacer bounds how many groups can lie here, and how old they
    can be; the trainer checks it. Nothing is thrown away here. A new process gets what it has to know by `restore`.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._groups: dict[Ticket, Group] = {}
        self._passed: set[int] = set()  # serials above `_head` that nobody need wait for any more
        self._head = 0  # the oldest ticket that is neither trained on nor dropped
        self._changed = asyncio.Condition()

    @batched
    async def add(self, ticket: Ticket, group: Group) -> None:
        async with self._changed:
            if not self._is_passed(ticket.serial):  # a batch may have taken it out of the process before this one
                self._groups[ticket] = group
                self._changed.notify_all()

    async def skip(self, ticket: Ticket) -> None:
        """This ticket's group was dropped: nobody need wait for it."""
        async with self._changed:
            self._pass(ticket)
            self._changed.notify_all()

    @returns_payload
    async def sample(self, count: int) -> tuple[Batch, BatchReport]:
        """Take `count` groups; parks until they are there. Woken by `add` and `skip`."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._available(count)) == count)
            tickets = self._available(count)
            groups = [self._groups.pop(ticket) for ticket in tickets]
            for ticket in tickets:
                self._pass(ticket)
        return Batch(groups), BatchReport(
            tickets=tuple(tickets),
            rewards=tuple(group.rewards for group in groups),
            lengths=tuple(tuple(len(completion.token_ids) for completion in g.completions) for g in groups),
            oldest_versions=tuple(group.oldest_version for group in groups),
            groups_waiting=len(self._groups),
        )

    @returns_payload
    async def state(self) -> tuple[list[tuple[int, Group]], None]:
        """The groups that lie here, each behind the serial of its ticket."""
        return [(ticket.serial, self._groups[ticket]) for ticket in sorted(self._groups)], None

    async def restore(
        self, awaited: Sequence[Ticket], next_serial: int, groups: Sequence[tuple[int, Group]] = ()
    ) -> None:
        """Begin with `groups`, and wait for those of the tickets `awaited` and of all from `next_serial` on."""
        async with self._changed:
            self._groups = {Ticket(serial): group for serial, group in groups}
            open_serials = {ticket.serial for ticket in (*awaited, *self._groups)}
            self._head = min(open_serials, default=next_serial)
            self._passed = set(range(self._head, next_serial)) - open_serials
            self._changed.notify_all()

    def _available(self, count: int) -> list[Ticket]:
        """Up to `count` groups that may be taken now, the longest admitted first.

        The window holds the W tickets from the oldest open one on; taking that one moves it.
        """
        chosen: list[Ticket] = []
        passed, head = set(self._passed), self._head
        while len(chosen) < count:
            window = map(Ticket, range(head, head + self._window))
            ready = next((t for t in window if t in self._groups and t.serial not in passed), None)
            if ready is None:
                break
            chosen.append(ready)
            passed.add(ready.serial)
            while head in passed:
                head += 1
        return chosen

    def _is_passed(self, serial: int) -> bool:
        return serial < self._head or serial in self._passed

    def _pass(self, ticket: Ticket) -> None:
        if self._is_passed(ticket.serial):
            return
        self._passed.add(ticket.serial)
        while self._head in self._passed:
            self._passed.remove(self._head)
            self._head += 1
