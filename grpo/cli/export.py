"""Make an ordinary Hugging Face folder of a checkpoint: `grpo export CHECKPOINT_OR_RUN_FOLDER OUT`.

Adapters (lora.rank) are merged into their model; with --adapters they are written alone, for peft.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.cli.main import ArgumentParser
from grpo.errors import CheckpointError, GRPOError

if TYPE_CHECKING:
    import torch


def main() -> None:
    """Export what the command line names, say what was written, and exit."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint, or a run's folder: its newest whole checkpoint")
    parser.add_argument("out", type=Path, help="the folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--adapters", action="store_true", help="write adapters alone, in float32")
    parser.add_argument("--trust-remote-code", action="store_true", help="for models that come with their own code")
    args = parser.parse_args()

    import torch  # after the arguments, which may only ask for help

    try:
        dtype = getattr(torch, args.dtype)
        checkpoint, warnings = export(
            args.source, args.out, dtype, adapters=args.adapters, trust_remote_code=args.trust_remote_code
        )
    except (GRPOError, OSError) as error:
        sys.exit(f"error: {error}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{checkpoint} -> {args.out}")


def export(
    source: Path, out: Path, dtype: torch.dtype, *, adapters: bool = False, trust_remote_code: bool = False
) -> tuple[Path, list[str]]:
    """Write the trained weights of `source` to `out`; return the checkpoint that they are from, and warnings.

    `source` is a checkpoint, a folder of checkpoints, or a run's folder. Weights are the trainer's own in float32,
    rounded once to `dtype`; adapters are merged into those of their base, or with `adapters` written by themselves, in
    float32. Raises CheckpointError when there is none that is whole, when `out` is in use or can't be written.
    """
    from grpo.checkpoint.store import MODEL, find_checkpoint, load_trainer
    from grpo.checkpoint.trainer_state import Parameters
    from grpo.config.actors import ModelConfig
    from grpo.models.export import export_merged, export_model
    from grpo.models.lora import adapted_base

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
