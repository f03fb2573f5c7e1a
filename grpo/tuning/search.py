"""Search for the smallest policy age, then the smallest rollout concurrency, that keep the trainer from waiting.

What a setting does is an `Outcome`, measured in short runs or simulated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from grpo.config.schema import ticket_capacity
from grpo.errors import TuningError
from grpo.types import EXIT_CODES

WARM_UP_STEPS = 5  # ignored: code and pages are loaded, and the first groups finish all at once
_PRECISION = 1.15  # ratio of a sufficient to an insufficient concurrency at which to stop: runs vary by more
_TRAIN = (sys.executable, "-m", "grpo.cli", "train")
_QUICK = ("eval.prompts=0", "checkpoint.every=0", "observe.report=false")


@dataclass(frozen=True)
class Outcome:
    """The pace of a run. `trainer_wait` and `generator_busy` are shares of the time, `policy_age` is in versions."""

    steps_per_s: float
    trainer_wait: float
    generator_busy: float
    policy_age: float


@dataclass(frozen=True, order=True)
class Setting:
    """Values of `buffer.max_policy_age` and `rollout.concurrency`."""

    max_policy_age: int
    concurrency: int

    @property
    def overrides(self) -> tuple[str, str]:
        return (f"rollout.concurrency={self.concurrency}", f"buffer.max_policy_age={self.max_policy_age}")

    def __str__(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Found:
    """The result of a search. Without `enough`, the target was missed; the trainer waits least with this setting."""

    setting: Setting
    outcome: Outcome
    enough: bool


def search(measure: Callable[[Setting], Outcome], groups_per_step: int, ages: Sequence[int], target: float) -> Found:
    """Find the setting; `target` is the share of its time that the trainer may wait.

    Younger samples are worth more than fewer rollouts. The first of the `ages` counts at which the maximal concurrency
    is enough; then the concurrency is halved until it isn't, and the border is narrowed down by bisection.
    """
    tried: dict[Setting, Outcome] = {}

    def is_enough(setting: Setting) -> bool:
        if setting not in tried:
            tried[setting] = measure(setting)
        return tried[setting].trainer_wait <= target

    for age in ages:
        most = Setting(age, ticket_capacity(groups_per_step, age))
        if is_enough(most):
            fewest = _fewest(is_enough, most)
            return Found(fewest, tried[fewest], enough=True)
    best = min(tried, key=lambda setting: tried[setting].trainer_wait)
    return Found(best, tried[best], enough=False)


def _fewest(is_enough: Callable[[Setting], bool], enough: Setting) -> Setting:
    age, too_few = enough.max_policy_age, 0
    while enough.concurrency > 1 and too_few == 0:
        half = Setting(age, enough.concurrency // 2)
        if is_enough(half):
            enough = half
        else:
            too_few = half.concurrency
    while enough.concurrency > max(too_few + 1, too_few * _PRECISION):
        middle = Setting(age, (enough.concurrency + too_few) // 2)
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle.concurrency
    return enough


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl. Raises TuningError when it can't be read."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise TuningError(f"{run} has no metrics: {error.strerror}") from None
    return [json.loads(line) for line in text.splitlines()]


def outcome_of(lines: Sequence[Mapping[str, float]]) -> Outcome:
    """Compute the outcome from lines of metrics.jsonl. Raises TuningError when there are too few."""
    counted = lines[WARM_UP_STEPS:]
    if not counted:
        raise TuningError(f"a run of {len(lines)} steps is too short: the first {WARM_UP_STEPS} don't count")
    total_s = sum(line["time/step_s"] for line in counted)
    return Outcome(
        steps_per_s=len(counted) / total_s,
        trainer_wait=sum(line["time/trainer_wait_s"] for line in counted) / total_s,
        generator_busy=fmean(line["generator/busy_fraction"] for line in counted),
        policy_age=fmean(line["policy_age/mean"] for line in counted),
    )


@dataclass(frozen=True)
class ShortRuns:
    """Measures settings by short runs of `grpo train` with `overrides`, each in its own folder below `folder`."""

    overrides: Sequence[str]
    steps: int
    folder: Path

    def run(self, setting: Setting) -> Path:
        """Train with a setting; return the run's folder. Raises TuningError when it failed, or KeyboardInterrupt."""
        folder = self.folder / f"age{setting.max_policy_age}_concurrency{setting.concurrency}"
        ours = (*setting.overrides, f"trainer.max_steps={self.steps}", *_QUICK, f"hydra.run.dir={folder}")
        command = [*_TRAIN, *self.overrides, *ours]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == EXIT_CODES["interrupted"]:
            raise KeyboardInterrupt
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise TuningError(f"the run with {setting} failed: {error.removeprefix('error: ')} ({folder})")
        return folder

    def measure(self, setting: Setting) -> Outcome:
        return outcome_of(read_metrics(self.run(setting)))
