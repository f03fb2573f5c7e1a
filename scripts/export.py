"""Make an ordinary Hugging Face folder of a checkpoint: `python scripts/export.py CHECKPOINT_OR_RUN_FOLDER OUT`.

Adapters (lora.rank) are merged into their model; with --adapters they are written alone, for peft.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint, or a run's folder: its newest whole checkpoint")
    parser.add_argument("out", type=Path, help="the folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--adapters", action="store_true", help="write adapters alone, in float32")
    parser.add_argument("--trust-remote-code", action="store_true", help="for models that come with their own code")
    args = parser.parse_args()

    import torch  # after the arguments, which may only ask for help

    from grpo.cli.export import export
    from grpo.errors import GRPOError

    try:
        checkpoint, warnings = export(
            args.source,
            args.out,
            getattr(torch, args.dtype),
            adapters=args.adapters,
            trust_remote_code=args.trust_remote_code,
        )
    except (GRPOError, OSError) as error:
        sys.exit(f"error: {error}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{checkpoint} -> {args.out}")


if __name__ == "__main__":
    main()
