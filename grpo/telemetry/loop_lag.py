"""Lag of an event loop, and the code that blocks it."""

from __future__ import annotations

import asyncio
import logging
import selectors
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

log = logging.getLogger(__name__)
_INTERVAL_S = 0.02
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


async def watch_loop(
    slow_callback_ms: float, blocked: Callable[[str], object], lagged: Callable[[float], object]
) -> NoReturn:
    """Measure by how much short sleeps overrun: for that long no other coroutine could run either.

    `lagged` gets each lag in seconds, `blocked` a message for each callback that blocks the loop for longer than
    `slow_callback_ms`.

    Consumes: nothing.
    Waits for: a sleep of 20 ms, over and over.
    Unblocked by: the clock.
    Ends when: cancelled.
    """
    loop = asyncio.get_running_loop()
    context = copy_context()  # that of the watcher's thread has no recording
    watcher = SlowCallbacks(
        slow_callback_ms, lambda message: loop.call_soon_threadsafe(blocked, message, context=context)
    )
    try:
        while True:
            due = loop.time() + _INTERVAL_S
            watcher.expect_beat(_INTERVAL_S)
            await asyncio.sleep(_INTERVAL_S)
            lagged(loop.time() - due)
    finally:
        watcher.close()


class LoopLag:
    """The lag of the driver's event loop, as figures of `metrics.jsonl`."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._blocked = 0

    async def watch(self, slow_callback_ms: float, warn: Callable[[str], None]) -> NoReturn:
        """Measure as `watch_loop` does, and call `warn` once for every place that blocks the loop."""
        warned: set[str] = set()

        def blocked(message: str) -> None:
            self._blocked += 1
            if message not in warned:
                warned.add(message)
                warn(message)

        await watch_loop(slow_callback_ms, blocked, lambda lag_s: self._lags_s.append(lag_s))

    def drain(self) -> dict[str, float]:
        """Return the lag in milliseconds and the number of slow callbacks since the last call."""
        lags_s, self._lags_s = self._lags_s or [0.0], []
        blocked, self._blocked = self._blocked, 0
        p50, p99, largest = (float(value) * 1000 for value in np.percentile(lags_s, (50, 99, 100)))
        return {
            "driver/loop_lag_p50_ms": p50,
            "driver/loop_lag_p99_ms": p99,
            "driver/loop_lag_max_ms": largest,
            "driver/slow_callbacks": blocked,
        }


class SlowCallbacks:
    """A thread that samples the stack of the constructing thread whenever its next heartbeat is late."""

    def __init__(self, slow_ms: float, blocked: Callable[[str], object]) -> None:
        """`blocked` is called in the other thread, once for each heartbeat that is late by `slow_ms`."""
        self._slow_ms, self._blocked = slow_ms, blocked
        self._watched = threading.get_ident()
        self._due_s = float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slow-callbacks", daemon=True)
        self._thread.start()

    def expect_beat(self, seconds: float) -> None:
        """Note that the next heartbeat is due in `seconds`; it counts as late `slow_ms` after that."""
        self._due_s = time.perf_counter() + seconds

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = float("inf")  # the heartbeat that was reported last, by its due time
        while not self._closed.wait(self._slow_ms / 4000):
            due_s = self._due_s
            if due_s != reported and (time.perf_counter() - due_s) * 1000 > self._slow_ms:
                reported = due_s
                frame = sys._current_frames().get(self._watched)
                # In select() the loop is idle: then the machine is late, not a callback.
                if frame is not None and frame.f_code.co_filename != selectors.__file__:
                    self._report(frame)

    def _report(self, frame: FrameType) -> None:
        stack = traceback.extract_stack(frame)
        ours = [entry for entry in stack if _is_ours(Path(entry.filename))]
        place = (ours or stack)[-1]
        log.warning("the event loop is blocked:\n%s", "".join(traceback.format_list(stack)))
        self._blocked(
            f"the event loop was blocked for more than {self._slow_ms:g} ms (driver.slow_callback_ms) in {place.name}, "
            f"{Path(place.filename).name}:{place.lineno}; the full stack is in run.log"
        )


def _is_ours(file: Path) -> bool:
    """Return True for code of this package and for the user's, False for that of Python and of other packages."""
    return file.is_relative_to(_PACKAGE) or not any(map(file.is_relative_to, _LIBRARIES))
