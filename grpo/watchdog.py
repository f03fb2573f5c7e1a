"""Ends a run in which nothing is trained any more, or says so, with who waits for what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from grpo.config import WatchdogConfig
from grpo.types import StalledError
from grpo.waiting import Activities

log = logging.getLogger(__name__)


class Watchdog:
    """Fed by progress. Where none came for `watchdog.seconds`, `watch` raises, or warns and waits on."""

    def __init__(self, config: WatchdogConfig, activities: Activities, warn: Callable[[str], None]) -> None:
        self._config, self._activities, self._warn = config, activities, warn
        self._fed = asyncio.Event()

    def feed(self) -> None:
        self._fed.set()

    async def watch(self) -> None:
        """Until cancelled. Raises StalledError, unless `watchdog.action` is warn."""
        silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(self._config.seconds):
                    await self._fed.wait()
            except TimeoutError:
                silent_s += self._config.seconds
                error = StalledError(self._message(silent_s))
                if self._config.action == "fail":
                    raise error from None
                log.warning("%s", error)
                self._warn(str(error))
            else:
                silent_s = 0.0
                self._fed.clear()

    def _message(self, silent_s: float) -> str:
        return f"nothing was done for {silent_s:g} s (watchdog.seconds): {self._activities.describe()}"
