"""How late the event loop is, the driver's own pulse, and what held it up."""

from __future__ import annotations

import asyncio
import logging
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

log = logging.getLogger(__name__)
_INTERVAL_S = 0.02
_PACKAGE = Path(__file__).parents[1]


class LoopLag:
    """Sleeps and measures by how much each sleep overran: that long no other coroutine could run either."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._blocked = 0

    async def watch(self, slow_callback_ms: float, warn: Callable[[str], None]) -> NoReturn:
        """Measure until cancelled. `warn` hears of every place that blocked the loop for longer than that, once."""
        loop = asyncio.get_running_loop()

        def blocked(message: str) -> None:
            self._blocked += 1
            if message not in told:
                told.add(message)
                warn(message)

        told: set[str] = set()
        watcher = SlowCallbacks(slow_callback_ms, lambda message: loop.call_soon_threadsafe(blocked, message))
        try:
            while True:
                due = loop.time() + _INTERVAL_S
                watcher.expect_beat(_INTERVAL_S)
                await asyncio.sleep(_INTERVAL_S)
                self._lags_s.append(loop.time() - due)
        finally:
            watcher.close()

    def take(self) -> dict[str, float]:
        """Lag in milliseconds, and how often a callback was too slow, since the last call."""
        lags_s, self._lags_s = self._lags_s or [0.0], []
        blocked, self._blocked = self._blocked, 0
        p50, p99, most = (float(value) * 1000 for value in np.percentile(lags_s, (50, 99, 100)))
        return {
            "driver/loop_lag_p50_ms": p50,
            "driver/loop_lag_p99_ms": p99,
            "driver/loop_lag_max_ms": most,
            "driver/slow_callbacks": blocked,
        }


class SlowCallbacks:
    """A thread that looks at what the thread at hand does while its next beat is late."""

    def __init__(self, slow_ms: float, blocked: Callable[[str], object]) -> None:
        """`blocked` is called in the other thread, once for each time that the beat is late by `slow_ms`."""
        self._slow_ms, self._blocked = slow_ms, blocked
        self._watched = threading.get_ident()
        self._due_s = float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slow-callbacks", daemon=True)
        self._thread.start()

    def expect_beat(self, seconds: float) -> None:
        """It is due in so many seconds, and called late from `slow_ms` after that on."""
        self._due_s = time.perf_counter() + seconds

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        told_of = float("inf")
        while not self._closed.wait(self._slow_ms / 4000):
            due_s = self._due_s
            if due_s != told_of and (time.perf_counter() - due_s) * 1000 > self._slow_ms:
                told_of = due_s
                frame = sys._current_frames().get(self._watched)
                if frame is not None and frame.f_code.co_filename != selectors.__file__:  # else the machine is late
                    self._report(frame)

    def _report(self, frame: FrameType) -> None:
        stack = traceback.extract_stack(frame)
        ours = [entry for entry in stack if Path(entry.filename).is_relative_to(_PACKAGE)]
        place = (ours or stack)[-1]
        log.warning("the event loop is blocked:\n%s", "".join(traceback.format_list(stack)))
        self._blocked(
            f"the event loop was blocked for more than {self._slow_ms:g} ms (driver.slow_callback_ms) in {place.name}, "
            f"{Path(place.filename).name}:{place.lineno}; the whole stack is in run.log"
        )
