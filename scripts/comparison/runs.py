"""One run of a comparison, in a worker process."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch

from grpo.cli import preflight
from grpo.config.schema import RunConfig
from grpo.driver.context import make_pacer
from grpo.driver.loop import train_loop
from grpo.driver.recorder import Recorder
from grpo.observe.terminal.display import Display
from grpo.observe.terminal.view import RunStatus, Sample
from grpo.services.failures import Failures
from grpo.services.local import launch_local
from grpo.types import EvaluationReport

Record = dict[str, Any]


class Watch(Display):
    """A display that shows nothing: it remembers, and ends the run when the target is reached, or all of them."""

    def __init__(self, target: float, stop: Event) -> None:
        self.shutdown = asyncio.Event()
        self.steps: list[Mapping[str, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        self._target, self._stop = target, stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to tidy up."""

    def step(self, metrics: Mapping[str, float]) -> None:
        self.steps.append(dict(metrics))
        if self._stop.is_set():
            self.shutdown.set()

    def evaluated(self, report: EvaluationReport) -> None:
        self.evaluations.append((report.step, report.reward_mean))
        if report.reward_mean >= self._target:
            self.shutdown.set()

    def sampled(self, sample: Sample) -> None:
        """Nobody looks."""

    async def watch(self, look: Callable[[], RunStatus]) -> None:
        """Nobody looks."""

    def warn(self, message: str) -> None:
        """It stands in the log, which goes to stderr here."""

    def outcome(self) -> Record:
        reached = next((step for step, reward in self.evaluations if reward >= self._target), None)
        rewards = [reward for _, reward in self.evaluations]
        until = [step["time/step_s"] for step in self.steps if reached is not None and step["step"] <= reached]
        return {
            "reached_step": reached,
            "reached_s": None if reached is None else sum(until),
            "steps": len(self.steps),
            "steps_s": sum(step["time/step_s"] for step in self.steps),
            "reward_best": max(rewards, default=math.nan),
            "reward_last": rewards[-1] if rewards else math.nan,
            "age_mean": self._mean("policy_age/mean"),
            "mismatch_k3": self._mean("mismatch/kl_k3"),
            "trainer_wait": self._mean("time/trainer_wait_s") * len(self.steps),
            "evaluations": self.evaluations,
        }

    def _mean(self, name: str) -> float:
        values = [step[name] for step in self.steps if name in step]
        return fmean(values) if values else math.nan


_stop: Event  # set when all runs are to end


def begin_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(1)


def make_run(config: RunConfig, target: float) -> Record:
    """Train until the target is reached or the steps are made; an error is part of what came of it."""
    watch, error = Watch(target, _stop), None
    with tempfile.TemporaryDirectory(prefix="compare-losses-") as folder:
        try:
            asyncio.run(_train(config, watch, Path(folder, "run")))
        except Exception as failure:  # one setting that fails must not end the comparison of the others
            error = f"{type(failure).__name__}: {failure}"
    return {**watch.outcome(), "error": error}


async def _train(config: RunConfig, watch: Watch, folder: Path) -> None:
    config, run_dir = preflight.open_run(config, preflight.check_names(config), folder)
    try:
        recorder = Recorder(run_dir, watch, make_pacer(config), Failures(config.recovery))
        async with launch_local(config, recorder.failures) as services:
            await train_loop(services, config, recorder, watch.shutdown)
    finally:
        run_dir.close()
