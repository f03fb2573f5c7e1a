"""Runs of the real loop, one after another on the same actors: to start these takes longer than a short run."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo.config.schema import RunConfig
from grpo.driver.context import make_pacer
from grpo.driver.loop import train_loop
from grpo.driver.pacing import Pacer
from grpo.driver.recorder import Recorder
from grpo.observe.run_dir import RunDirectory
from grpo.observe.terminal.display import Display
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle, Services


async def run_on(actors: Mapping[str, ActorHandle], config: RunConfig, failures: Failures, watch: Display) -> Pacer:
    """A run from the start with the recorder that every run has; `watch` sees its steps. `actors` by their nouns."""
    await actors["replay_buffer"].restore.call_one((), 0)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(RunDirectory(Path(folder)), watch, make_pacer(config), failures)
        await train_loop(Services(**actors), config, recorder, asyncio.Event())
        recorder.run_dir.close()
    return recorder.pacer


@dataclass(frozen=True)
class Pace:
    """Of the driver, once the loop has warmed up. `cpu_s` is of the whole process and per group."""

    groups_per_s: float
    cpu_s: float
    lag_p99_ms: float
    calls_per_group: float


class Watch(Display):
    """Notes the time, and the process's CPU time, of every step."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []
        self._lags_ms: list[float] = []

    def step(self, metrics: Mapping[str, float]) -> None:
        self._seen.append((time.perf_counter(), time.process_time()))
        self._lags_ms.append(metrics["driver/loop_lag_p99_ms"])

    def pace(self, groups_per_step: int, warm_up: int, calls_per_group: float) -> Pace:
        """Without the first `warm_up` steps: a wave, and a second one where the first was staggered, for the calls that
        pile up at the start to be worked off.
        """
        (began, cpu_began), (ended, cpu_ended) = self._seen[warm_up - 1], self._seen[-1]
        groups = (len(self._seen) - warm_up) * groups_per_step
        lag_ms = max(self._lags_ms[warm_up:])
        return Pace(groups / (ended - began), (cpu_ended - cpu_began) / groups, lag_ms, calls_per_group)
