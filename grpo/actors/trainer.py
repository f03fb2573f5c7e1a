"""Trains the policy and publishes its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from grpo.actors.marks import copied_to_driver, rank_zero_only, returns_payload
from grpo.checkpoint.trainer_state import TrainerState
from grpo.config.schema import RunConfig
from grpo.errors import TransferError
from grpo.learner.learner import Learner
from grpo.learner.objective import Objective
from grpo.models.lora import adapters_off, load_policy
from grpo.telemetry.recording import measure, span
from grpo.types import Batch
from grpo.utils.ranks import Ranks, join, leave
from grpo.utils.torch_utils import ComputeThread, run_in_temp_thread
from grpo.weights.broadcast import Broadcaster, BroadcastGroup
from grpo.weights.payload import Weights, WeightsHeader


class Trainer:
    """One train step at a time, in a thread of its own.

    Of `trainer.ranks` processes this is number `rank`: each is given every call but those of rank 0, in the same order.
    """

    def __init__(self, config: RunConfig, *, device: str = "cpu", threads: int = 0, rank: int = 0) -> None:
        self._config, self._device, self._threads = config, device, threads
        self._ranks, self._joined = Ranks(rank, config.trainer.ranks), False
        self._thread = ComputeThread("trainer", threads)
        self._broadcaster = Broadcaster()
        self._written: Weights | None = None

    async def setup(self, rendezvous: tuple[str, int] | None = None) -> None:
        """Load the model. Several ranks meet at `rendezvous`, host and port of rank 0, and share it out."""
        config, device = self._config, self._device
        if rendezvous is not None:
            mine = "cuda:0" if device == "cuda" else device  # no other GPU is seen here
            await self._thread.run(join, self._ranks, rendezvous, mine, config.recovery.collective_timeout_s)
            self._joined, device = True, "cpu"  # from where each rank takes only its part
        model = await run_in_temp_thread(self._threads, load_policy, config, device)
        self._learner = await self._thread.run(  # which tries the model out
            Learner,
            model,
            config.trainer,
            Objective(config.loss, config.correction),
            temperature=config.rollout.temperature or 1.0,
            age_bound=config.age_bound,
            compute_dtype=getattr(torch, config.model.dtype),
            ranks=self._ranks,
            as_reference=partial(adapters_off, model) if config.uses_adapters and config.loss.beta > 0 else None,
        )

    async def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; metrics by name."""
        return await self._thread.run(self._train_step, batch)

    @copied_to_driver
    @returns_payload
    async def push_weights(self) -> tuple[Weights | None, int]:
        """The present weights, of which rank 0 alone has them all, and their version."""
        await self.write_weights()
        return self._written, self._learner.version

    async def write_weights(self) -> WeightsHeader | None:
        """Copy the present weights to where `send_weights` and `written_weights` find them; rank 0 says what they are.

        They are written over by the next call, or by `push_weights`, which must not come before all have them.
        """
        with span("publish"):
            self._written = await self._thread.run(self._learner.weights)
        if self._written is None:
            return None
        measure("trainer/published_bytes", self._written.buffer.nbytes)
        return self._written.header

    @rank_zero_only
    async def send_weights(self, header: WeightsHeader, group: BroadcastGroup) -> None:
        """Broadcast what was written, beside the next step. Raises TransferError, also when that were other weights."""
        if self._written is None or self._written.header != header:
            raise TransferError("the trainer is a new one that has written no such weights")
        with span("send"):
            await self._broadcaster.send(group, self._written)

    @rank_zero_only
    async def leave_group(self, number: int) -> None:
        """A broadcast to it raises TransferError, under way or to come."""
        self._broadcaster.leave(number)

    @rank_zero_only
    @copied_to_driver
    @returns_payload
    async def written_weights(self) -> tuple[Weights | None, int | None]:
        """What was written, and its version; None where nothing was."""
        return self._written, None if self._written is None else self._written.version

    @copied_to_driver
    @returns_payload
    async def snapshot(self) -> tuple[TrainerState, int]:
        """This rank's part of all that another trainer needs to go on from here, and the version. See Learner.state."""
        with span("snapshot"):
            state = await self._thread.run(self._learner.state)
        return state, state.version

    async def restore(self, states: Sequence[TrainerState]) -> None:
        """Go on from a snapshot of any number of ranks. Raises CheckpointError, with nothing changed, for a bad one."""
        await self._thread.run(self._learner.restore, states)

    async def close(self) -> None:
        self._broadcaster.leave()
        if self._joined:
            await self._thread.run(leave)
        self._thread.close()

    def _train_step(self, batch: Batch) -> dict[str, float]:
        with span("train_step", version=self._learner.version):
            return self._learner.train_step(batch)
