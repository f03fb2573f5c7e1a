"""The trainer actor: trains the policy and publishes its weights."""

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
    """Run a Learner in a compute thread, one train step at a time.

    This process is number `rank` of `trainer.ranks`. Every rank gets the same calls in the same order, except for the
    methods marked `rank_zero_only`.

    Example:
        trainer = Trainer(config)
        await trainer.setup()
        weights, version = await trainer.push_weights()  # version 0: the model as loaded
        metrics = await trainer.train_step(Batch(groups))
        weights, version = await trainer.push_weights()  # version 1
        await trainer.close()
    """

    def __init__(self, config: RunConfig, *, device: str = "cpu", threads: int = 0, rank: int = 0) -> None:
        self._config, self._device, self._threads = config, device, threads
        self._ranks, self._joined = Ranks(rank, config.trainer.ranks), False
        self._thread = ComputeThread("trainer", threads)
        self._broadcaster = Broadcaster()
        self._written: Weights | None = None

    async def setup(self, rendezvous: tuple[str, int] | None = None) -> None:
        """Load the model. Several ranks meet at `rendezvous`, host and port of rank 0, and shard it."""
        config, device = self._config, self._device
        if rendezvous is not None:
            own = "cuda:0" if device == "cuda" else device  # each rank sees one GPU
            await self._thread.run(join, self._ranks, rendezvous, own, config.recovery.collective_timeout_s)
            self._joined, device = True, "cpu"  # the whole model stays on the CPU; a rank moves its part to its device

        # Loading uses a temporary thread. The learner probes the model, which belongs in the compute thread.
        model = await run_in_temp_thread(self._threads, load_policy, config, device)
        self._learner = await self._thread.run(
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
        """Train on a batch; returns metrics by name. See Learner.train_step."""
        return await self._thread.run(self._train_step, batch)

    @copied_to_driver
    @returns_payload
    async def push_weights(self) -> tuple[Weights | None, int]:
        """Return the current weights, None on ranks other than 0, and their version."""
        await self.write_weights()
        return self._written, self._learner.version

    async def write_weights(self) -> WeightsHeader | None:
        """Copy the current weights for `send_weights` and `written_weights`; rank 0 returns their header.

        The next call, also of `push_weights`, overwrites them. It must not come before all receivers have them.
        """
        with span("publish"):
            self._written = await self._thread.run(self._learner.weights)
        if self._written is None:
            return None
        measure("trainer/published_bytes", self._written.buffer.nbytes)
        return self._written.header

    @rank_zero_only
    async def send_weights(self, header: WeightsHeader, group: BroadcastGroup) -> None:
        """Broadcast the written weights beside the next step. Raises TransferError, also if `header` is not theirs."""
        if self._written is None or self._written.header != header:
            raise TransferError("this trainer was restarted and has not written these weights")
        with span("send"):
            await self._broadcaster.send(group, self._written)

    @rank_zero_only
    async def leave_group(self, number: int) -> None:
        """Abort the broadcast to a group: one in progress, or to come, raises TransferError."""
        self._broadcaster.leave(number)

    @rank_zero_only
    @copied_to_driver
    @returns_payload
    async def written_weights(self) -> tuple[Weights | None, int | None]:
        """Return the written weights and their version, or None and None."""
        return self._written, None if self._written is None else self._written.version

    @copied_to_driver
    @returns_payload
    async def snapshot(self) -> tuple[TrainerState, int]:
        """Return this rank's part of a snapshot to resume from, and its version; see Learner.state."""
        with span("snapshot"):
            state = await self._thread.run(self._learner.state)
        return state, state.version

    async def restore(self, states: Sequence[TrainerState]) -> None:
        """Resume from a snapshot of any number of ranks. An invalid one raises CheckpointError and changes nothing."""
        await self._thread.run(self._learner.restore, states)

    async def close(self) -> None:
        self._broadcaster.leave()
        if self._joined:
            await self._thread.run(leave)
        self._thread.close()

    def _train_step(self, batch: Batch) -> dict[str, float]:
        with span("train_step", version=self._learner.version):
            return self._learner.train_step(batch)
