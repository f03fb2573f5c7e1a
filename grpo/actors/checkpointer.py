"""The actor that writes checkpoints, and reads them when a run is resumed."""

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
from grpo.checkpoint.trainer_state import TrainerState
from grpo.config.schema import RunConfig
from grpo.telemetry.recording import span
from grpo.types import Group
from grpo.utils.torch_utils import ComputeThread

log = logging.getLogger(__name__)


class Checkpointer:
    """Write and read checkpoints one at a time in a compute thread. Runs on the driver's node, where `folder` is."""

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
        """Write the checkpoint of a step and remove all but the newest ones; return its `seconds` and `bytes`.

        `states` are the states of all ranks, `groups` pairs (ticket serial, group with its values). Raises
        CheckpointError if it can't be written.
        """
        with span("save", step=step):
            return await self._thread.run(self._save, step, states, groups, progress)

    @returns_payload
    async def load_trainer(self, path: str) -> tuple[Sequence[TrainerState], None]:
        """Return the learner's state in a checkpoint, of all ranks. Raises CheckpointError."""
        return await self._thread.run(store.load_trainer, Path(path)), None

    @returns_payload
    async def load_groups(self, path: str) -> tuple[list[tuple[int, Group]], list[int]]:
        """Return the (ticket serial, group) pairs of a checkpoint, and the serials. Raises CheckpointError."""
        groups = await self._thread.run(store.load_groups, Path(path))
        return groups, [serial for serial, _ in groups]

    async def close(self) -> None:
        """Wait for a checkpoint in progress."""
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
        except OSError as error:  # the new checkpoint is complete all the same
            log.warning("older checkpoints than %s can't be removed: %s; keeping them", path, error)
        return {"seconds": time.perf_counter() - started, "bytes": float(store.total_bytes(path))}

    def _export(self, parameters: Mapping[str, torch.Tensor], folder: Path) -> None:
        from grpo.models import export  # lazy: a second of imports that would delay the start

        if self._config.uses_adapters:
            export.export_adapters(self._config.model, self._config.lora, parameters, folder)
        else:
            export.export_model(self._config.model, parameters, getattr(torch, self._config.model.dtype), folder)
