"""What the parts of a run share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.config.schema import RunConfig
from grpo.driver.pacing import AutoConcurrency, Concurrency, Pacer
from grpo.driver.prompts import PromptQueue
from grpo.driver.recorder import Recorder
from grpo.driver.weight_sync import WeightSync
from grpo.errors import PayloadLost, RewardError, ZeroVarianceGroup
from grpo.services.handle import Services
from grpo.types import Rollout, Ticket


def make_pacer(config: RunConfig) -> Pacer:
    """What `rollout.concurrency`, `buffer.max_policy_age` and `trainer.groups_per_step` ask for."""
    concurrency = Concurrency(config.most_rollouts)
    if config.rollout.concurrency == "auto":
        concurrency = AutoConcurrency(
            config.most_rollouts, start=config.trainer.groups_per_step, target=config.rollout.target_trainer_idle
        )
    return Pacer(config.ticket_capacity, concurrency)


@dataclass(frozen=True)
class RunContext:
    """Made by the loop, handed to its coroutines and to what works beside them."""

    services: Services
    pacer: Pacer
    prompts: PromptQueue
    weights: WeightSync
    config: RunConfig
    recorder: Recorder
    shutdown: asyncio.Event

    def group_finished(self, ticket: Ticket, rollout: Rollout) -> None:
        """It lies in the replay buffer."""
        self.pacer.is_buffered(ticket)
        self.recorder.group_finished(rollout)
        if self.config.filter.zero_variance:
            self.recorder.failures.group_kept(self.config.trainer.groups_per_step)

    async def drop(self, ticket: Ticket, error: RewardError | ZeroVarianceGroup) -> None:
        """Leave a group out and hand its ticket back.

        Raises the error where it isn't tolerated, and DataError when there were too many.
        """
        if isinstance(error, RewardError) and self.config.reward.on_error == "fail":
            raise error
        self.recorder.group_dropped(ticket, error)
        self.pacer.drop(ticket, error.reason)
        if isinstance(error, ZeroVarianceGroup):
            self.prompts.learned(error.rollout.group.prompt, error.rollout.group.rewards)
            limit = self.config.filter.max_dropped_batches * self.config.trainer.groups_per_step
            self.recorder.failures.group_filtered(error, limit)
        else:
            self.recorder.failures.reward_failed(error)
        await self.services.replay_buffer.skip.call_one(ticket)

    def lost(self, ticket: Ticket, error: PayloadLost) -> None:
        """The group that was being made for this ticket is made again, unless that happens too often."""
        self.recorder.failures.payload_lost(error)
        self.requeue([ticket], "payload")

    def requeue(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Groups that are lost, with a process, a node or the run before, are made again."""
        self.recorder.groups_requeued(tickets, reason)
        self.pacer.requeue(tickets, reason)
