"""Simulate a run in virtual time: the real driver loop, on actors that take as long as a profile says.

The clock of the event loop jumps to the next timer, so hours of waiting take as long as the code between the waits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import selectors
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from grpo.config.actors import EvalConfig, WeightSyncConfig
from grpo.config.algorithm import LossConfig, ShapingConfig, TaskConfig
from grpo.config.operation import CheckpointConfig, WatchdogConfig
from grpo.config.schema import RunConfig
from grpo.driver.context import make_pacer
from grpo.driver.loop import train_loop
from grpo.driver.pacing import Pacer
from grpo.driver.recorder import Recorder, Replicas, TrainedStep
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
Metrics = dict[str, float]
_NEVER_S = 1e12
_PATIENCE_S = 5.0  # real seconds to wait for threads when no timer is left


def simulate(profile: Profile, config: RunConfig, steps: int) -> Outcome:
    """Return the outcome of `steps` train steps with these settings, without evaluations and checkpoints."""
    with TemporaryDirectory() as folder:
        recorder = _Recorder(RunDirectory(Path(folder)), make_pacer(config), Failures(config.recovery))
        config = _simulated_config(config, steps)
        run_in_virtual_time(_run(World(profile, config), config, recorder))
        recorder.run_dir.close()
    return outcome_of(recorder.lines)


async def _run(world: World, config: RunConfig, recorder: _Recorder) -> None:
    async with launch_local(config, recorder.failures, simulated_actors(world)) as services:
        await train_loop(services, config, recorder, asyncio.Event())


def _simulated_config(config: RunConfig, steps: int) -> RunConfig:
    """Switch off what a profile doesn't describe, and all timeouts: hours of virtual time may pass between events."""
    return dataclasses.replace(
        config,
        task=TaskConfig(),  # its code may not be here
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
    """Measures by the virtual clock, and keeps only what an outcome needs."""

    def __init__(self, run_dir: RunDirectory, pacer: Pacer, failures: Failures) -> None:
        super().__init__(run_dir, Display(), pacer, failures)
        self.lines: list[Metrics] = []
        self._before_s = 0.0
        self._rates = GeneratorRates((), 0.0)

    async def watch(self, replicas: Callable[[], Replicas], slow_callback_ms: float) -> None:
        """Return at once: lag means nothing in virtual time."""

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(asyncio.get_running_loop().time)

    def training_begins(self, generators: Sequence[GeneratorStats]) -> None:
        super().training_begins(generators)
        self._before_s = asyncio.get_running_loop().time()
        self._rates = GeneratorRates(generators, self._before_s)

    def group_finished(self, rollout: Rollout, dropped: str | None = None) -> None:
        """Ignore groups."""

    @contextmanager
    def metrics_line(self, trained: TrainedStep, generators: Sequence[GeneratorStats]) -> Iterator[None]:
        now_s = asyncio.get_running_loop().time()
        step_s, self._before_s = now_s - self._before_s, now_s
        rates = self._rates.update(generators, now_s)
        self.lines.append({**trained.metrics, **trained.times.seconds, **rates, "time/step_s": step_s})
        self.step = trained.number
        self.failures.step_trained()
        yield


def run_in_virtual_time(work: Coroutine[Any, Any, R]) -> R:
    """Run like `asyncio.run`, with a clock that starts at 0 (`asyncio.get_running_loop().time()`).

    Raises RuntimeError for a deadlock: every task waits for another one, and no timer is left.
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
    """Instead of sleeping until the loop's next timer, advances the loop's clock to it."""

    def __init__(self, loop: _VirtualTimeLoop) -> None:
        self._loop, self._selector = loop, selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without a timer, only a thread can wake the loop: wait for it in real time.
        ready = self._selector.select(_PATIENCE_S if timeout is None else 0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: every task waits for another one, and no timer is left")
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
