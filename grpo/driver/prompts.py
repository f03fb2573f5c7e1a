"""The stream of prompts as the driver sees it."""

# MERGED: Which problems there is nothing to learn from at present.

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from grpo.driver.pacing import Pacer
from grpo.services.handle import ActorHandle
from grpo.telemetry.activity import waiting_for
from grpo.types import Prompt, PromptBatch, Ticket


class PromptQueue:
    """Prompts by ticket, fetched ahead in bulk, so that a group costs a fraction of a call to the dataloader."""

    def __init__(self, dataloader: ActorHandle, pacer: Pacer, bulk: int, by_difficulty: bool = False) -> None:
        self.handed_out = 0
        self._dataloader, self._pacer, self._bulk = dataloader, pacer, bulk
        self._difficulty, self._by_difficulty = Difficulty(), by_difficulty
        self._prompts: deque[Prompt] = deque()
        self._next_serial = 0  # behind those fetched
        self._fetching = asyncio.Lock()
        self._fetched_without: frozenset[int] = frozenset()  # the problems that were left out of the last fetch
        self._left_out: tuple[int, ...] = ()  # the serials where that happened
        self._left_out_before = 0  # how many there were in earlier fetches

    async def prompt_for(self, ticket: Ticket) -> Prompt:
        """The ticket's prompt if it has one, else the next of the stream.

        The first to find the queue empty fetches for all.
        """
        if (serial := self._pacer.prompt_of(ticket)) is not None:
            prompt: Prompt = await self._dataloader.prompt.call_one(serial)
            return prompt
        with waiting_for("prompts") if self._fetching.locked() else nullcontext():
            await self._fetching.acquire()
        try:
            if not self._prompts:
                await self._fetch(self._bulk, self._difficulty.left_out)
            prompt = self._prompts.popleft()
        finally:
            self._fetching.release()
        self._pacer.has_prompt(ticket, prompt.serial)
        self.handed_out += 1
        return prompt

    def learned(self, prompt: Prompt, rewards: Sequence[float]) -> None:
        """What the group of a prompt earned. The next fetch goes by it, with `dataloader.sampling=difficulty`."""
        if self._by_difficulty:
            self._difficulty.learned(prompt, rewards)

    @property
    def next_serial(self) -> int:
        """Where the stream goes on for somebody who has not fetched ahead."""
        return self._prompts[0].serial if self._prompts else self._next_serial

    def counts(self) -> dict[str, int]:
        """Prompts handed out to rollouts, and those before them that were over the length limit, or left out."""
        left_out = self._left_out_before + sum(serial < self.next_serial for serial in self._left_out)
        return {
            "handed_out": self.handed_out,
            "skipped_length": self.next_serial - self.handed_out - left_out,
            "left_out_difficulty": left_out,
        }

    def state(self) -> dict[str, Any]:
        """The place in the stream, what happened on the way there, which problems are left out; as JSON can hold it.

        And how the prompts ahead were fetched: more may be left out by now, but not of these.
        """
        without = sorted(self._fetched_without) if self._prompts else []
        return {
            "next_serial": self.next_serial,
            "handed_out": self.handed_out,
            "left_out_difficulty": self.counts()["left_out_difficulty"],
            "difficulty": self._difficulty.state(),
            "ahead": {"count": len(self._prompts), "without": without},
        }

    async def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, also from one of a version that knew no difficulty."""
        self._prompts.clear()
        self._next_serial, self.handed_out = state["next_serial"], state["handed_out"]
        self._left_out, self._left_out_before = (), state.get("left_out_difficulty", 0)
        self._difficulty = Difficulty(state.get("difficulty", ()))
        ahead = state.get("ahead", {"count": 0})
        if ahead["count"]:
            await self._fetch(ahead["count"], frozenset(ahead["without"]))

    async def _fetch(self, count: int, without: frozenset[int]) -> None:
        batch: PromptBatch = await self._dataloader.sample.call_one(self._next_serial, count, without)
        self._prompts.extend(batch.prompts)
        self._next_serial = batch.next_serial
        self._left_out_before += len(self._left_out)
        self._left_out, self._fetched_without = batch.left_out, without


class Difficulty:
    """Remembers the problems whose last group earned one reward throughout: solved always, or never.

    Such a group has no advantages, so the dataloader leaves its problem out of the stream, but for a share of its turns
    (`dataloader.revisit_fraction`): there it shows whether the problem has become easy or hard enough since.
    """

    def __init__(self, left_out: Iterable[int] = ()) -> None:
        self._left_out = set(left_out)

    @property
    def left_out(self) -> frozenset[int]:
        """The problems as they are now, by their index in the task."""
        return frozenset(self._left_out)

    def learned(self, prompt: Prompt, rewards: Sequence[float]) -> None:
        """The last group of a problem is the one that counts."""
        if min(rewards) == max(rewards):
            self._left_out.add(prompt.problem_index)
        else:
            self._left_out.discard(prompt.problem_index)

    def state(self) -> list[int]:
        """As JSON can hold it, and the constructor takes it."""
        return sorted(self._left_out)
