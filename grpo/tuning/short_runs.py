"""What a setting does, measured: a short run with it, as one would type it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.exit_codes import EXIT_CODES
from grpo.tuning.outcome import Outcome, outcome_of, read_metrics
from grpo.tuning.search import Setting
from grpo.types import TuningError

_TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
_QUICK = ("eval.prompts=0", "checkpoint.every=0", "observe.report=false")


@dataclass(frozen=True)
class ShortRuns:
    """Runs `scripts/train.py` with `overrides`, each in a folder of its own below `folder`."""

    overrides: Sequence[str]
    steps: int
    folder: Path

    def run(self, setting: Setting) -> Path:
        """Returns the run's folder. Raises TuningError when it failed, KeyboardInterrupt when it was interrupted."""
        folder = self.folder / f"age{setting.max_policy_age}_concurrency{setting.concurrency}"
        ours = (*setting.overrides, f"trainer.max_steps={self.steps}", *_QUICK, f"hydra.run.dir={folder}")
        command = [sys.executable, str(_TRAIN), *self.overrides, *ours]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == EXIT_CODES["interrupted"]:
            raise KeyboardInterrupt
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise TuningError(f"the run with {setting} failed, {error.removeprefix('error: ')} ({folder})")
        return folder

    def measure(self, setting: Setting) -> Outcome:
        return outcome_of(read_metrics(self.run(setting)))
