"""Writes the run's checkpoints, and reads them when a run goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.actors.marks import returns_payload
from grpo.checkpoint import store
from grpo.checkpoint.store import total_bytes
from grpo.checkpoint.trainer_state import TrainerState
from grpo.config.schema import RunConfig
from grpo.telemetry.recording import span
from grpo.types import Group
from grpo.utils.torch_utils import ComputeThread

log = logging.getLogger(__name__)


class Checkpointer:
    """One piece of work at a time, in a thread of its own. It lives where `folder` is: on the driver's node."""

    def __init__(self, config: RunConfig, folder: str) -> None:
        self._config, self._folder = config, Path(folder)
        self._thread = ComputeThread("checkpointer", 1)

    async def save(
        self,
        step: int,
        states: Sequence[TrainerState],
        groups: Iterable[tuple[int, Group]],
        progress: Mapping[str, Any],
    ) -> dict[str, float]:
        """Write the checkpoint of a step, then remove all but the newest ones; how many `seconds` and `bytes` it took.

        `states` are those of the ranks, `groups` pairs (ticket serial, group with its values). Raises CheckpointError
        when it can't be written.
        """
        with span("save", step=step):
            return await self._thread.run(self._save, step, states, groups, progress)

    @returns_payload
    async def load_trainer(self, path: str) -> tuple[Sequence[TrainerState], None]:
        """The learner's state of the checkpoint at `path`, of all ranks. Raises CheckpointError."""
        return await self._thread.run(store.load_trainer, Path(path)), None

    @returns_payload
    async def load_groups(self, path: str) -> tuple[list[tuple[int, Group]], list[int]]:
        """The (ticket serial, group) pairs of the checkpoint at `path`, and the serials. Raises CheckpointError."""
        groups = await self._thread.run(store.load_groups, Path(path))
        return groups, [serial for serial, _ in groups]

    async def close(self) -> None:
        """Wait for a checkpoint that is being written."""
        await asyncio.to_thread(self._thread.close)

    def _save(
        self,
        step: int,
        states: Sequence[TrainerState],
        groups: Iterable[tuple[int, Group]],
        progress: Mapping[str, Any],
    ) -> dict[str, float]:
        started = time.perf_counter()
        path = store.save_checkpoint(self._folder, step, states, groups, progress, self._export)
        try:
            store.prune(self._folder, self._config.checkpoint.keep)
        except OSError as error:  # this one is written all the same
            log.warning("checkpoints before %s can't be removed: %s", path, error)
        return {"seconds": time.perf_counter() - started, "bytes": float(total_bytes(path))}

    def _export(self, parameters: Mapping[str, torch.Tensor], folder: Path) -> None:
        from grpo.models import export  # a second of imports that no run shall wait for when it starts

        if self._config.uses_adapters:
            export.export_adapters(self._config.model, self._config.lora, parameters, folder)
        else:
            export.export_model(self._config.model, parameters, getattr(torch, self._config.model.dtype), folder)
