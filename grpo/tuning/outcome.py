"""What a run with some settings was like, as far as its pace goes; the same of a real and of a simulated one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from grpo.types import TuningError

WARM_UP_STEPS = 5  # that don't count: code and pages are loaded, the first groups all come at once


@dataclass(frozen=True)
class Outcome:
    """`trainer_wait` and `generator_busy` are shares of the time, `policy_age` is in versions."""

    steps_per_s: float
    trainer_wait: float
    generator_busy: float
    policy_age: float


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of its metrics.jsonl. Raises TuningError when there is none."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise TuningError(f"{run} has no metrics: {error.strerror}") from None
    return [json.loads(line) for line in text.splitlines()]


def outcome_of(lines: Sequence[Mapping[str, float]]) -> Outcome:
    """From the lines of metrics.jsonl. Raises TuningError when there are too few."""
    counted = lines[WARM_UP_STEPS:]
    if not counted:
        raise TuningError(f"a run of {len(lines)} steps says nothing: the first {WARM_UP_STEPS} don't count")
    total_s = sum(line["time/step_s"] for line in counted)
    return Outcome(
        steps_per_s=len(counted) / total_s,
        trainer_wait=sum(line["time/trainer_wait_s"] for line in counted) / total_s,
        generator_busy=fmean(line["generator/busy_fraction"] for line in counted),
        policy_age=fmean(line["policy_age/mean"] for line in counted),
    )
