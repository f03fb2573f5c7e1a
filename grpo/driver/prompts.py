"""The driver's end of the stream of prompts, and the difficulty of problems as their groups show it."""

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
    """Assigns prompts to tickets. Prompts are fetched `bulk` at a time: a group costs a fraction of a call."""

    def __init__(self, dataloader: ActorHandle, pacer: Pacer, bulk: int, by_difficulty: bool = False) -> None:
        self.handed_out = 0
        self._dataloader, self._pacer, self._bulk = dataloader, pacer, bulk
        self._difficulty, self._by_difficulty = Difficulty(), by_difficulty
        self._prompts: deque[Prompt] = deque()
        self._next_serial = 0  # the first that was not fetched
        self._fetching = asyncio.Lock()
        self._fetched_without: frozenset[int] = frozenset()  # problem indices left out of the last fetch
        self._left_out: tuple[int, ...] = ()  # serials left out of the last fetch
        self._left_out_before = 0  # number of serials left out of earlier fetches

    async def prompt_for(self, ticket: Ticket) -> Prompt:
        """Return the ticket's prompt if it has one, else assign the next prompt of the stream to it.

        The first caller that finds the queue empty fetches for all callers.
        """
        if (serial := self._pacer.prompt_of(ticket)) is not None:
            requeued: Prompt = await self._dataloader.prompt.call_one(serial)
            return requeued
        with waiting_for("prompts") if self._fetching.locked() else nullcontext():
            await self._fetching.acquire()
        try:
            if not self._prompts:
                await self._fetch(self._bulk, self._difficulty.left_out)
            prompt = self._prompts.popleft()
        finally:
            self._fetching.release()
        self._pacer.assign_prompt(ticket, prompt.serial)
        self.handed_out += 1
        return prompt

    def record_rewards(self, prompt: Prompt, rewards: Sequence[float]) -> None:
        """Let the rewards of a prompt's group influence the next fetch, if `dataloader.sampling` is "difficulty"."""
        if self._by_difficulty:
            self._difficulty.record_rewards(prompt, rewards)

    @property
    def next_serial(self) -> int:
        """The serial of the first prompt that was not handed out."""
        return self._prompts[0].serial if self._prompts else self._next_serial

    def counts(self) -> dict[str, int]:
        """Return how many prompts were handed out, were over the length limit, and were left out by difficulty."""
        left_out = self._left_out_before + sum(serial < self.next_serial for serial in self._left_out)
        return {
            "handed_out": self.handed_out,
            "skipped_length": self.next_serial - self.handed_out - left_out,
            "left_out_difficulty": left_out,
        }

    def state(self) -> dict[str, Any]:
        """Return the position in the stream, the counts and the problems left out, JSON-serializable.

        `ahead` describes the prompts fetched ahead: they were fetched without the problems left out at that time.
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
        """Continue from a `state`; one of an older version may lack the fields of difficulty sampling."""
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
    """Remembers the problems whose last group had equal rewards: solved always, or never.

    Such a group has zero advantages, so the dataloader leaves its problem out of the stream. For a fraction of its
    occurrences (`dataloader.revisit_fraction`) the problem is kept, to find out whether its difficulty has changed.
    """

    def __init__(self, left_out: Iterable[int] = ()) -> None:
        self._left_out = set(left_out)

    @property
    def left_out(self) -> frozenset[int]:
        """The problems to leave out, by their index in the task."""
        return frozenset(self._left_out)

    def record_rewards(self, prompt: Prompt, rewards: Sequence[float]) -> None:
        """Leave the problem out if all rewards of its group are equal, else put it back."""
        if min(rewards) == max(rewards):
            self._left_out.add(prompt.problem_index)
        else:
            self._left_out.discard(prompt.problem_index)

    def state(self) -> list[int]:
        """Return the argument of a constructor that continues here, JSON-serializable."""
        return sorted(self._left_out)
