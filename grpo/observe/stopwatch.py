"""How long the stages of a step take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grpo.telemetry.recording import span


class Stopwatch:
    """Named durations in seconds, spans of the timeline too: `with stopwatch("time/train_step_s"): ...`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def __call__(self, name: str, **args: Any) -> Iterator[None]:
        started = self._clock()
        try:
            with span(name.removeprefix("time/").removesuffix("_s"), "stage", **args):
                yield
        finally:
            self.seconds[name] = self._clock() - started
