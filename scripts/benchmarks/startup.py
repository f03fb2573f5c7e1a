"""From the command to the first trained step of the default experiment, the model cached, and where the time goes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure

_TRAIN = Path(__file__).parents[1] / "train.py"


def run(quick: bool) -> list[Figure]:
    _start()  # teaches the model its format, fills the caches of the disk
    starts = [_start() for _ in range(1 if quick else 5)]
    stages = {stage: median(start[stage] for start in starts) for stage in starts[0]}
    return [
        *(Figure("startup", stage.replace("_", " "), seconds, "s") for stage, seconds in stages.items()),
        Figure("startup", "to the first trained step", median(sum(s.values()) for s in starts), "s", at_most=15.0),
    ]


def _start() -> dict[str, float]:
    """Seconds by stage, as the summary has them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ("trainer.max_steps=1", "eval.prompts=0", "checkpoint.every=0", "observe.report=false")
        subprocess.run(
            [sys.executable, str(_TRAIN), *settings, f"hydra.run.dir={folder}/run"], check=True, capture_output=True
        )
        stages: dict[str, float] = json.loads(Path(folder, "run", "summary.json").read_text())["startup_s"]
        return stages
