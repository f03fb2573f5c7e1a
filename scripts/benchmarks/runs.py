"""Runs of the real loop, one after another on the same actors: to start these takes longer than a short run."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
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
