"""A run that takes no time: the real loop, in virtual time, on actors that take as long as a profile says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from grpo.cluster.local import launch_local
from grpo.config import (
    CheckpointConfig,
    EvalConfig,
    LossConfig,
    RunConfig,
    ShapingConfig,
    WatchdogConfig,
    WeightsConfig,
)
from grpo.failures import Failures
from grpo.loop import run
from grpo.observe.display import Silent
from grpo.observe.recorder import Recorder, TrainedStep
from grpo.observe.run_dir import RunDirectory
from grpo.observe.since_last_step import GeneratorRates
from grpo.observe.stopwatch import Stopwatch
from grpo.pacing import Pacer
from grpo.run import make_pacer
from grpo.tuning.outcome import Outcome, outcome_of
from grpo.tuning.profile import Profile
from grpo.tuning.simulated import simulated_actors
from grpo.tuning.virtual_time import run_in_virtual_time
from grpo.tuning.world import World
from grpo.types import GeneratorStats, Rollout

Metrics = dict[str, float]

_NEVER_S = 1e12


def simulate(profile: Profile, config: RunConfig, steps: int) -> Outcome:
    """What `steps` train steps of a run with these settings would be like, evaluations and checkpoints left out."""
    with TemporaryDirectory() as folder:
        recorder = _Recorder(RunDirectory(Path(folder)), make_pacer(config), Failures(config.recovery))
        config = _as_simulated(config, steps)
        run_in_virtual_time(_run(World(profile, config), config, recorder))
        recorder.run_dir.close()
    return outcome_of(recorder.lines)


async def _run(world: World, config: RunConfig, recorder: _Recorder) -> None:
    async with launch_local(config, recorder.failures, simulated_actors(world)) as services:
        await run(services, config, recorder, asyncio.Event())


def _as_simulated(config: RunConfig, steps: int) -> RunConfig:
    """Without what a profile knows nothing of; and nothing may be found late: there are hours between two events."""
    return dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, max_steps=steps),
        generator=dataclasses.replace(config.generator, max_replicas=None),
        loss=LossConfig(beta=config.loss.beta),
        shaping=ShapingConfig(),
        weights=WeightsConfig(),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every=0),
        watchdog=WatchdogConfig(seconds=_NEVER_S),
        recovery=dataclasses.replace(config.recovery, health_every_s=_NEVER_S, health_timeout_s=_NEVER_S),
        resume=None,
    )


class _Recorder(Recorder):
    """Reads the virtual clock, and keeps only what an outcome is made of."""

    def __init__(self, run_dir: RunDirectory, pacer: Pacer, failures: Failures) -> None:
        super().__init__(run_dir, Silent(), pacer, failures)
        self.lines: list[Metrics] = []
        self._before_s = 0.0
        self._rates = GeneratorRates((), 0.0)

    async def watch(self, slow_callback_ms: float) -> None:
        """Nothing: this loop has no lag."""

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(asyncio.get_running_loop().time)

    def training_begins(self, generators: Sequence[GeneratorStats]) -> None:
        super().training_begins(generators)
        self._before_s = asyncio.get_running_loop().time()
        self._rates = GeneratorRates(generators, self._before_s)

    def group_finished(self, rollout: Rollout, dropped: str | None = None) -> None:
        """Nothing of it is wanted."""

    @contextmanager
    def metrics_line(self, trained: TrainedStep, generators: Sequence[GeneratorStats]) -> Iterator[None]:
        now_s = asyncio.get_running_loop().time()
        step_s, self._before_s = now_s - self._before_s, now_s
        rates = self._rates.take(generators, now_s)
        self.lines.append({**trained.metrics, **trained.times.seconds, **rates, "time/step_s": step_s})
        self.step = trained.number
        self.failures.step_trained()
        yield
