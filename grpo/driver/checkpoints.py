"""Checkpoints: taken between two steps, written beside the training, and the way back from one."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.driver.context import RunContext
from grpo.driver.recovery import Recovery
from grpo.errors import CheckpointError, PayloadLost
from grpo.telemetry.activity import begin_activity
from grpo.types import Ticket


class Checkpoints:
    """Writes a checkpoint every `checkpoint.every` steps and at the end, and restores one at the start.

    The training waits only until the state lies in the object store; a process of its own brings it to disk. One that
    is due while another is being written is skipped and counted, the last one never. One that can't be written is a
    warning: the training goes on.
    """

    def __init__(self, run: RunContext, recovery: Recovery, tasks: asyncio.TaskGroup) -> None:
        self._run, self._recovery, self._tasks = run, recovery, tasks
        self._recorder, self._every = run.recorder, run.config.checkpoint.every
        self._writing: asyncio.Task[None] | None = None
        self._newest = 0  # the step of the newest one that was written or restored

    async def after(self, step: int) -> None:
        """Take one of the trainer as it is after `step`, if it is due; that of the last step is left to `finish`."""
        if self._every == 0 or step % self._every or step == self._run.config.trainer.max_steps:
            return
        if self._writing is not None and not self._writing.done():
            self._recorder.checkpoint_skipped(step)
            return
        await self._begin(step)

    async def finish(self, step: int) -> None:
        """The last one, of `step`, unless it is there; returns when it is written, or can't be."""
        await self._written()
        if self._every and step > self._newest:
            await self._begin(step)
            await self._written()

    async def restore(self, path: Path, progress: Mapping[str, Any]) -> None:
        """Bring the actors, the ledger and the records to where the checkpoint at `path` was taken."""
        services, pacer = self._run.services, self._run.pacer
        assert services.checkpointer is not None
        states, _ = await services.checkpointer.load_trainer.call_one(str(path))
        await services.trainer.restore.call(states)
        self._recovery.resume_from(progress["step"], states)
        groups, serials = await services.checkpointer.load_groups.call_one(str(path))
        await self._run.prompts.restore(progress["prompts"])
        pacer.restore(progress["ledger"])
        kept = {Ticket(serial) for serial in serials}
        lost = [ticket for ticket in pacer.in_stage("rollout") if ticket not in kept]
        await services.replay_buffer.restore.call_one(lost, pacer.admitted, groups)
        for ticket in kept:
            pacer.is_buffered(ticket)
        self._run.requeue(lost, "resumed")
        self._recorder.restore(progress["step"], progress["records"])
        self._newest = progress["step"]

    async def _begin(self, step: int) -> None:
        await self._run.weights.done()  # then the tickets of the step are back: what was trained on is not begun again
        started = time.perf_counter()
        states = await self._recovery.snapshot(step)
        groups, _ = await self._run.services.replay_buffer.state.call_one()
        # From here to the next await everything is of one moment; what joined the buffer just now is made again.
        progress = {
            "step": step,
            "run_folder": str(self._recorder.run_dir.path),
            "config": dataclasses.asdict(self._run.config),
            "ledger": self._run.pacer.state(),
            "prompts": self._run.prompts.state(),
            "records": self._recorder.state(),
        }
        files = await asyncio.wrap_future(self._recorder.run_dir.sizes())
        self._recorder.checkpoint_taken(time.perf_counter() - started)
        self._writing = self._tasks.create_task(
            self._write(step, states, groups, progress | {"files": files}), name=f"checkpoint-{step}"
        )

    async def _write(self, step: int, states: Any, groups: Any, progress: dict[str, Any]) -> None:
        assert self._run.services.checkpointer is not None
        begin_activity("checkpoint")
        try:
            report = await self._run.services.checkpointer.save.call_one(step, states, groups, progress)
        except (CheckpointError, PayloadLost) as error:  # neither a full disk nor a lost node must end the training
            self._recorder.checkpoint_failed(step, error)
        else:
            self._newest = step
            self._recorder.checkpoint_written(report)

    async def _written(self) -> None:
        if self._writing is not None:
            await self._writing
