"""An event loop whose clock jumps to the next timer: hours of waiting take as long as the code between the waits."""

# MERGED: A run that takes no time: the real loop, in virtual time, on actors that take as long as a profile says.

from __future__ import annotations

import asyncio
import dataclasses
import selectors
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from grpo.config.schema import (
    CheckpointConfig,
    EvalConfig,
    LossConfig,
    RunConfig,
    ShapingConfig,
    WatchdogConfig,
    WeightSyncConfig,
)
from grpo.driver.context import make_pacer
from grpo.driver.loop import train_loop
from grpo.driver.pacing import Pacer
from grpo.driver.recorder import Recorder, TrainedStep
from grpo.observe.metrics import GeneratorRates, Stopwatch
from grpo.observe.run_dir import RunDirectory
from grpo.observe.terminal.display import Display
from grpo.services.failures import Failures
from grpo.services.local import launch_local
from grpo.tuning.actors import simulated_actors
from grpo.tuning.machine import World
from grpo.tuning.profile import Profile
from grpo.tuning.search import Outcome, outcome_of
from grpo.types import GeneratorStats, Rollout

R = TypeVar("R")
_PATIENCE_S = 5.0  # for threads, in real time, where no timer is left


def run_in_virtual_time(work: Coroutine[Any, Any, R]) -> R:
    """`asyncio.run` with a clock that starts at 0; `asyncio.get_running_loop().time()` reads it.

    Raises RuntimeError when everybody waits for somebody else, so that no time could ever end it.
    """
    with asyncio.Runner(loop_factory=_VirtualTimeLoop) as runner:
        return runner.run(work)


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now_s

    def jump(self, seconds: float) -> None:
        self._now_s += seconds


class _JumpingSelector(selectors.BaseSelector):
    """Where the loop would sleep until its next timer, the time of that timer comes at once."""

    def __init__(self, loop: _VirtualTimeLoop) -> None:
        self._loop, self._selector = loop, selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._selector.select(_PATIENCE_S if timeout is None else 0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for another one: no time will ever end this")
        if not ready and timeout:
            self._loop.jump(timeout)
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        self._selector.close()


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
        await train_loop(services, config, recorder, asyncio.Event())


def _as_simulated(config: RunConfig, steps: int) -> RunConfig:
    """Without what a profile knows nothing of; and nothing may be found late: there are hours between two events."""
    return dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, max_steps=steps),
        generator=dataclasses.replace(config.generator, max_replicas=None),
        loss=LossConfig(beta=config.loss.beta),
        shaping=ShapingConfig(),
        weight_sync=WeightSyncConfig(),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every=0),
        watchdog=WatchdogConfig(seconds=_NEVER_S),
        recovery=dataclasses.replace(config.recovery, health_interval_s=_NEVER_S, health_timeout_s=_NEVER_S),
        resume=None,
    )


class _Recorder(Recorder):
    """Reads the virtual clock, and keeps only what an outcome is made of."""

    def __init__(self, run_dir: RunDirectory, pacer: Pacer, failures: Failures) -> None:
        super().__init__(run_dir, Display(), pacer, failures)
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
        rates = self._rates.update(generators, now_s)
        self.lines.append({**trained.metrics, **trained.times.seconds, **rates, "time/step_s": step_s})
        self.step = trained.number
        self.failures.step_trained()
        yield
