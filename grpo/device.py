"""Where a model computes: the one place that chooses a device, and says what it can't do."""

from __future__ import annotations

import torch

from grpo.config import RunConfig
from grpo.types import ConfigError


def device_for(num_gpus: float) -> str:
    """Of an actor that asks for so many GPUs, or for a share of one. Ray shows it those that it got, as the first."""
    return "cuda" if num_gpus > 0 else "cpu"


def broadcast_backend(config: RunConfig) -> str:
    """Of torch.distributed, for weights on their way to the generators: `weights.backend`, or which one `auto` is.

    NCCL has a GPU in one process of a group only, so none that is shared; vLLM's is that of processes of its own; and
    on one where ranks of the trainer talk over it at the same time, each may wait for the other.
    """
    if config.weights.backend != "auto":
        return config.weights.backend
    whole_gpus = config.trainer.num_gpus >= 1 and config.generator.num_gpus >= 1
    return "nccl" if whole_gpus and config.generator.engine == "torch" and config.trainer.ranks == 1 else "gloo"


def gpus_here() -> int:
    """How many this process can compute on."""
    return torch.cuda.device_count()


def check_device(device: str, dtype: str) -> None:
    """Raise ConfigError where `device` (cpu or cuda) is not there for torch, or does not compute in `dtype`."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        reason = "it is built without CUDA" if torch.version.cuda is None else "the driver is missing or too old"
        raise ConfigError(
            f"Ray gave this actor a GPU, but torch {torch.__version__} has none: {reason}; install a torch for this "
            "GPU on every node, or set it to 0",
            key="num_gpus",
        )
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16 (those since Ampere do); take float32",
            key="model.dtype",
        )
