"""What the parts of a run share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.config import RunConfig
from grpo.observe.recorder import Recorder
from grpo.pacing import Pacer
from grpo.rollout import PromptQueue
from grpo.services import Services
from grpo.types import Ticket


@dataclass(frozen=True)
class Run:
    """Made by the loop, handed to its coroutines and to what works beside them."""

    services: Services
    pacer: Pacer
    prompts: PromptQueue
    config: RunConfig
    recorder: Recorder
    shutdown: asyncio.Event

    def begin_again(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Groups that are lost, with a process, a node or the run before, are made again."""
        self.recorder.groups_begun_again(tickets, reason)
        self.pacer.begin_again(tickets, reason)
