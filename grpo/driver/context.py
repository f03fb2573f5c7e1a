"""Shared state of one run, passed to the rollout and training coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.config.schema import RunConfig
from grpo.driver.pacing import AutoConcurrency, Concurrency, Pacer
from grpo.driver.prompts import PromptQueue
from grpo.driver.recorder import Recorder
from grpo.driver.rollout import ends_run
from grpo.driver.weight_sync import WeightSync
from grpo.errors import GroupError, PayloadLost, ZeroVarianceGroup
from grpo.services.handle import Services
from grpo.types import Rollout, Ticket


def make_pacer(config: RunConfig) -> Pacer:
    """Build the pacer for `rollout.concurrency`, `buffer.max_policy_age` and `trainer.groups_per_step`."""
    concurrency = Concurrency(config.most_rollouts)
    if config.rollout.concurrency == "auto":
        concurrency = AutoConcurrency(
            config.most_rollouts, start=config.trainer.groups_per_step, target=config.rollout.target_trainer_idle
        )
    return Pacer(config.ticket_capacity, concurrency)


@dataclass(frozen=True)
class RunContext:
    """State that `train_loop` shares with its coroutines, evaluation, checkpoints and recovery.

    A method stands here when an event concerns several members: the ledger, the recorder and the failure budgets.

    Example:
        ticket = await run.pacer.admit()
        try:
            await make_group(ticket, run)
        except GroupError as error:
            await run.drop(ticket, error)       # the group is counted as dropped, its ticket returns
        except PayloadLost as error:
            run.requeue_lost(ticket, error)     # the ticket stays out, the group is generated again
    """

    services: Services
    pacer: Pacer
    prompts: PromptQueue
    weights: WeightSync
    config: RunConfig
    recorder: Recorder
    shutdown: asyncio.Event

    def group_finished(self, ticket: Ticket, rollout: Rollout) -> None:
        """Record a group that was added to the replay buffer."""
        self.pacer.mark_buffered(ticket)
        self.recorder.group_finished(rollout)
        if self.config.filter.zero_variance:
            self.recorder.failures.group_kept(self.config.trainer.groups_per_step)

    async def drop(self, ticket: Ticket, error: GroupError | ZeroVarianceGroup) -> None:
        """Drop the ticket's group, count it by reason and return the ticket.

        Raises `error` when `reward.on_error` or `environment.on_error` is "fail", and DataError when too many groups
        were dropped.
        """
        if isinstance(error, GroupError) and ends_run(self.config, error):
            raise error
        self.recorder.group_dropped(ticket, error)
        self.pacer.drop(ticket, error.reason)
        if isinstance(error, ZeroVarianceGroup):
            self.prompts.record_rewards(error.rollout.group.prompt, error.rollout.group.rewards)
            limit = self.config.filter.max_dropped_batches * self.config.trainer.groups_per_step
            self.recorder.failures.group_filtered(error, limit)
        else:
            self.recorder.failures.group_failed(error)
        await self.services.replay_buffer.skip.call_one(ticket)

    def requeue_lost(self, ticket: Ticket, error: PayloadLost) -> None:
        """Generate the ticket's group again, because its tokens were lost with a node."""
        self.recorder.failures.payload_lost(error)
        self.requeue([ticket], "payload")

    def requeue(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Generate the groups of `tickets` again; they were lost with a process, a node or the previous run."""
        self.recorder.groups_requeued(tickets, reason)
        self.pacer.requeue(tickets, reason)
