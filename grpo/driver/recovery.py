"""Recovery of the stateful actors: restore a replacement process of the trainer or of the replay buffer.

A call that was acknowledged is part of the state restored here; the service repeats every other call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpo.driver.context import RunContext
from grpo.errors import PayloadLost, RecoveryError
from grpo.services.handle import NewReplica


@dataclass
class TrainerSnapshot:
    """A trainer's state after `step`, in parts by rank, and the batches since. Step -1, None: the state after setup."""

    step: int = -1
    snapshot: Any = None
    batches: list[Any] = field(default_factory=list)


class Recovery:
    """Keeps a snapshot of the trainer's state and the batches since, and replays them on a replacement.

    The driver owns both in the object store, so they outlive the trainer's processes. The previous snapshot is kept as
    well until the next is taken: the newest may be lost with the trainer's node before it is copied to the driver's.
    The replacement trains the same steps again, so only time is lost. Where arithmetic is not reproducible (on most
    GPUs), its weights differ by rounding from the same version in the generators, until the next is published.
    """

    def __init__(self, run: RunContext) -> None:
        self._run, self._every = run, run.config.trainer.snapshot_every
        self._snapshots = [TrainerSnapshot()]  # oldest first, at most two
        run.services.replay_buffer.on_restart(self.restore_replay_buffer)
        run.services.trainer.on_restart(self.restore_trainer)

    async def step_trained(self, step: int, batch: Any) -> None:
        """Keep the batch of a step, and take a snapshot after the step if one is due."""
        if self._every > 0:
            self._snapshots[-1].batches.append(batch)
            if step % self._every == 0:
                await self.snapshot(step)

    async def snapshot(self, step: int) -> Any:
        """Return references to the trainer's state after `step`, the last one trained, in the order of the ranks."""
        if self._snapshots[-1].step == step:
            return self._snapshots[-1].snapshot
        del self._snapshots[:-1]  # before the copy: the object store has room for two
        snapshot = tuple(state for state, _version in await self._run.services.trainer.snapshot.call())
        if self._every > 0:
            self._snapshots.append(TrainerSnapshot(step, snapshot))
        return snapshot

    def resume_from(self, step: int, snapshot: Any) -> None:
        """Start from a checkpoint: `snapshot` is the trainer's state after `step`."""
        self._snapshots = [TrainerSnapshot(step, snapshot)]

    async def restore_trainer(self, replica: NewReplica) -> None:
        """Bring a replacement to the last trained step. Raises RecoveryError if no snapshot is left."""
        if self._every == 0:
            raise RecoveryError(
                "the trainer died, and trainer.snapshot_every=0 keeps no copy of its state; continue from the last "
                "checkpoint with resume=auto"
            )
        await self._restore_snapshot(replica)
        for batch in self._snapshots[-1].batches:
            await replica.train_step.call_one(batch)

    async def _restore_snapshot(self, replica: NewReplica) -> None:
        """Restore the newest snapshot that is not lost. A lost one passes its batches on to the one before."""
        while (newest := self._snapshots[-1]).snapshot is not None:
            try:
                await replica.restore.call_one(newest.snapshot)
                return
            except PayloadLost as error:
                if len(self._snapshots) == 1:
                    raise RecoveryError(
                        "the trainer's state was lost with its node before it was copied to another node; continue "
                        "from the last checkpoint with resume=auto"
                    ) from error
                del self._snapshots[-1]
                self._snapshots[-1].batches += newest.batches

    async def restore_replay_buffer(self, replica: NewReplica) -> None:
        """Make a replacement wait for all groups that are not in training; requeue those that the old buffer held."""
        pacer = self._run.pacer
        lost = pacer.in_stage("buffered")
        await replica.restore.call_one(pacer.in_stage("rollout", "buffered"), pacer.admitted)
        self._run.requeue(lost, "replay_buffer")
