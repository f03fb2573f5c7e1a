"""From any checkpoint to an ordinary Hugging Face folder, or to one of adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from grpo.checkpoint.store import MODEL, find_checkpoint, load_trainer
from grpo.checkpoint.trainer_state import Parameters
from grpo.config.schema import ModelConfig
from grpo.errors import CheckpointError
from grpo.models.export import export_merged, export_model
from grpo.models.lora import adapted_base


def export(
    source: Path, out: Path, dtype: torch.dtype, *, adapters: bool = False, trust_remote_code: bool = False
) -> tuple[Path, list[str]]:
    """Write the trained weights of `source` to `out`: the checkpoint that they are from, and warnings.

    `source` is a checkpoint, a folder of checkpoints, or a run's folder. Weights are the trainer's own in float32,
    rounded once to `dtype`; adapters are merged into those of their base, or with `adapters` written by themselves, in
    float32. Raises CheckpointError when there is none that is whole, when `out` is in use or can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is already there; name a folder that is new or empty")
    checkpoint, warnings = find_checkpoint(source)
    model = ModelConfig(path=str(checkpoint / MODEL), trust_remote_code=trust_remote_code)
    adapted = adapted_base(model) is not None
    if adapters and not adapted:
        raise CheckpointError(f"{checkpoint} is of a whole model, not of adapters: leave out --adapters")
    try:
        if adapters:
            shutil.copytree(checkpoint / MODEL, out, dirs_exist_ok=True)
        elif adapted:
            export_merged(model, dtype, out)
        else:
            export_model(model, Parameters(load_trainer(checkpoint)), dtype, out)
    except Exception as error:
        shutil.rmtree(out, ignore_errors=True)
        raise CheckpointError(f"{out} can't be written: {' '.join(str(error).split())}") from error
    return checkpoint, warnings
