"""The half of the vLLM engine that lives in vLLM's own processes: weights come in, and nobody is left behind.

vLLM imports this module in every worker because the engine names `WorkerExtension` as its extension class.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from grpo.engines.vllm.engine import BACKEND, read_shared
from grpo.weights.flat_buffer import TensorSpec
from grpo.weights.payload import Weights

_PR_SET_PDEATHSIG = 1


class WorkerExtension:
    """Nothing to add to the worker: that it is imported is what counts."""


@dataclass
class SharedMemory(WeightTransferInitInfo):
    """Where the published weights will be: a file of `size` bytes that only exists in memory."""

    path: str
    size: int


@dataclass
class Layout(WeightTransferUpdateInfo):
    """Where each parameter lies in the shared memory: (name, shape, dtype, offset in bytes)."""

    parameters: Sequence[tuple[str, Sequence[int], str, int]]

    def weights(self, buffer: np.ndarray) -> Weights:
        specs = tuple(
            TensorSpec(name, tuple(shape), getattr(torch, dtype), offset)
            for name, shape, dtype, offset in self.parameters
        )
        return Weights(0, specs, buffer)


class SharedMemoryTransfer(WeightTransferEngine[SharedMemory, Layout]):
    """Loads checkpoint-format weights out of memory that the generator shares with its workers."""

    init_info_cls = SharedMemory
    update_info_cls = Layout

    def init_transfer_engine(self, init_info: SharedMemory) -> None:
        self._buffer = read_shared(init_info.path, init_info.size)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Layout) -> None:
        self.model.load_weights(self._on_device(update_info))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        """The mapping ends with the process."""

    def _on_device(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in layout.weights(self._buffer).tensors():
            yield name, tensor.to(self.device)


def _repack_tied_head(model: Any) -> None:
    """On CPU vLLM computes with a repacked copy of each matrix, and its reload forgets that of a tied output head."""
    head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is not None and embedding is not None and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it went before the line above


_die_with_parent()
# The reload warns of every tied head and table that no checkpoint holds; that weights are complete is checked before.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
