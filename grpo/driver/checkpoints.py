"""Checkpoints: taken between two train steps, written to disk beside training, restored when a run is resumed."""

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
    """Saves a checkpoint every `checkpoint.every` steps and at the end; restores one at the start.

    Training waits only until the state is in the object store; the checkpointer process writes it to disk. A
    checkpoint that is due while another is being written is skipped and counted, unless it is the last one. Failing to
    write one is a warning, and training continues.
    """

    def __init__(self, run: RunContext, recovery: Recovery, tasks: asyncio.TaskGroup) -> None:
        self._run, self._recovery, self._tasks = run, recovery, tasks
        self._recorder, self._every = run.recorder, run.config.checkpoint.every
        self._writing: asyncio.Task[None] | None = None
        self._newest = 0  # step of the newest checkpoint written or restored

    async def save_if_due(self, step: int) -> None:
        """Save a checkpoint of `step`, which was just trained, if one is due; `finish` saves the last step."""
        if self._every == 0 or step % self._every or step == self._run.config.trainer.max_steps:
            return
        if self._writing is not None and not self._writing.done():
            self._recorder.checkpoint_skipped(step)
            return
        await self._save(step)

    async def finish(self, step: int) -> None:
        """Save the last checkpoint, of `step`, unless it exists; wait until it is written or has failed."""
        await self._wait_written()
        if self._every and step > self._newest:
            await self._save(step)
            await self._wait_written()

    async def restore(self, path: Path, progress: Mapping[str, Any]) -> None:
        """Bring the actors, the ledger and the records to the state of the checkpoint at `path`."""
        services, pacer = self._run.services, self._run.pacer
        assert services.checkpointer is not None
        states, _ = await services.checkpointer.load_trainer.call_one(str(path))
        await services.trainer.restore.call(states)
        self._recovery.resume_from(progress["step"], states)

        # The groups in the checkpoint return to the replay buffer; the outstanding rest is generated again.
        groups, serials = await services.checkpointer.load_groups.call_one(str(path))
        await self._run.prompts.restore(progress["prompts"])
        pacer.restore(progress["ledger"])
        kept = {Ticket(serial) for serial in serials}
        lost = [ticket for ticket in pacer.in_stage("rollout") if ticket not in kept]
        await services.replay_buffer.restore.call_one(lost, pacer.admitted, groups)
        for ticket in kept:
            pacer.mark_buffered(ticket)
        self._run.requeue(lost, "resumed")
        self._recorder.restore(progress["step"], progress["records"])
        self._newest = progress["step"]

    async def _save(self, step: int) -> None:
        """Copy the state of `step` into the object store and start the task that writes it."""
        await self._run.weights.wait_overlapped()  # the step's tickets have returned: a resume won't requeue them
        started = time.perf_counter()
        states = await self._recovery.snapshot(step)
        groups, _ = await self._run.services.replay_buffer.state.call_one()
        # No await until `progress` is complete: it describes one moment. A group that was added to the buffer since
        # `state` is outstanding in this ledger and missing in `groups`: a resumed run generates it again.
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
        """Have the checkpointer write one checkpoint, as a task beside training.

        Consumes: references to the state in the object store.
        Waits for: the checkpointer.
        Unblocked by: the checkpoint being on disk; a checkpointer that died is replaced and asked again.
        Ends when: the checkpoint is written, or can't be, which is a warning.
        """
        assert self._run.services.checkpointer is not None
        begin_activity("checkpoint")
        try:
            report = await self._run.services.checkpointer.save.call_one(step, states, groups, progress)
        except (CheckpointError, PayloadLost) as error:  # a full disk or a lost node must not end training
            self._recorder.checkpoint_failed(step, error)
        else:
            self._newest = step
            self._recorder.checkpoint_written(report)

    async def _wait_written(self) -> None:
        if self._writing is not None:
            await self._writing
