"""Part of the vLLM engine that runs in vLLM's processes: it loads weights, and dies with its parent process.

vLLM imports this module in every worker because the engine names `WorkerExtension` as its extension class.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from grpo.engines.vllm.engine import BACKEND, read_shared
from grpo.weights.flat_buffer import TensorSpec, views

_PR_SET_PDEATHSIG = 1


class WorkerExtension:
    """Empty extension of the worker: vLLM needs a class to import this module for."""


@dataclass
class SharedMemory(WeightTransferInitInfo):
    """Path and size in bytes of the SharedBuffer through which weights are published."""

    path: str
    size: int


@dataclass
class Layout(WeightTransferUpdateInfo):
    """Location of each parameter in the shared memory: (name, shape, dtype, offset in bytes)."""

    parameters: Sequence[tuple[str, Sequence[int], str, int]]


class SharedMemoryTransfer(WeightTransferEngine[SharedMemory, Layout]):
    """Load checkpoint-format weights from memory that the generator shares with its workers."""

    init_info_cls = SharedMemory
    update_info_cls = Layout

    def init_transfer_engine(self, init_info: SharedMemory) -> None:
        self._buffer = read_shared(init_info.path, init_info.size)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Layout) -> None:
        specs = tuple(
            TensorSpec(name, tuple(shape), getattr(torch, dtype), offset)
            for name, shape, dtype, offset in update_info.parameters
        )
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in views(specs, self._buffer))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # On a CPU vLLM computes with a repacked copy of each matrix, and its reload omits that of a tied output head.
        head = getattr(self.model, "lm_head", None)
        embedding = getattr(getattr(self.model, "model", None), "embed_tokens", None)
        if head is not None and embedding is not None and head.weight is embedding.weight:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Do nothing: the mapping ends with the process."""


def _die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # the parent ended before the line above


_die_with_parent()
# The reload warns of every tied head and table that no checkpoint holds. The engine has checked for missing weights.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
