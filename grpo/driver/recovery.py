"""What the driver does for actors with a memory, the replay buffer and the trainer, when a new process replaces one.

A call is either acknowledged, and then part of what is restored here, or the service makes it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpo.driver.context import RunContext
from grpo.errors import PayloadLost, RecoveryError
from grpo.services.handle import NewReplica


@dataclass
class TrainerSnapshot:
    """A trainer's state after `step`, in parts by rank, and the batches it was given since; at first, that of setup."""

    step: int = -1
    snapshot: Any = None
    batches: list[Any] = field(default_factory=list)


class Recovery:
    """Keeps what a new trainer needs: a snapshot of its state, and the batches since.

    All of it lies in the object store under the driver's name, so it outlives the trainer's processes. The newest
    snapshot may still be on its way to the driver's node when that of the trainer is lost, so the one before is kept
    until the next is taken. The trainer takes the same steps again, and nothing is lost but time. Where the arithmetic
    is not reproducible (on most GPUs) generators hold weights of the present version that differ from its own by
    rounding, until the next ones are published.
    """

    def __init__(self, run: RunContext) -> None:
        self._run, self._every = run, run.config.trainer.snapshot_every
        self._kept = [TrainerSnapshot()]  # the newest one last
        run.services.replay_buffer.on_restart(self.restore_replay_buffer)
        run.services.trainer.on_restart(self.restore_trainer)

    async def step_trained(self, step: int, batch: Any) -> None:
        """Remember the batch of a step, or take a snapshot behind it where that is due."""
        if self._every > 0:
            self._kept[-1].batches.append(batch)
            if step % self._every == 0:
                await self.snapshot(step)

    async def snapshot(self, step: int) -> Any:
        """References to the trainer's state after `step`, its last one, in the order of the ranks."""
        if self._kept[-1].step == step:
            return self._kept[-1].snapshot
        del self._kept[:-1]  # two at most take up room
        snapshot = tuple(state for state, _version in await self._run.services.trainer.snapshot.call())
        if self._every > 0:
            self._kept.append(TrainerSnapshot(step, snapshot))
        return snapshot

    def resume_from(self, step: int, snapshot: Any) -> None:
        """The trainer's state after `step`, all that a new one needs so far."""
        self._kept = [TrainerSnapshot(step, snapshot)]

    async def restore_trainer(self, replica: NewReplica) -> None:
        """Raises RecoveryError when nothing was kept, or nothing of it is left."""
        if self._every == 0:
            raise RecoveryError(
                "the trainer died, and trainer.snapshot_every=0 keeps no copy of its state; resume=auto goes on from "
                "the last checkpoint"
            )
        await self._restore_snapshot(replica)
        for batch in self._kept[-1].batches:
            await replica.train_step.call_one(batch)

    async def _restore_snapshot(self, replica: NewReplica) -> None:
        """The newest that is left, which has then all batches since."""
        while (newest := self._kept[-1]).snapshot is not None:
            try:
                await replica.restore.call_one(newest.snapshot)
                return
            except PayloadLost as error:
                if len(self._kept) == 1:
                    raise RecoveryError(
                        "the trainer's state was lost with its node before a copy of it had left that; resume=auto "
                        "goes on from the last checkpoint"
                    ) from error
                del self._kept[-1]
                self._kept[-1].batches += newest.batches

    async def restore_replay_buffer(self, replica: NewReplica) -> None:
        """It awaits every group that is not in training; those that lay in the old one are made again."""
        pacer = self._run.pacer
        lost = pacer.in_stage("buffered")
        await replica.restore.call_one(pacer.in_stage("rollout", "buffered"), pacer.admitted)
        self._run.requeue(lost, "replay_buffer")
