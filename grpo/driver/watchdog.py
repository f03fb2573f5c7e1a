"""Ends a run in which nothing is trained any more, or says so, with who waits for what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from grpo.config.operation import WatchdogConfig
from grpo.errors import StalledError
from grpo.telemetry.activity import describe_blocked
from grpo.utils.aio import Signal, cancel_and_wait

R = TypeVar("R")


class Watchdog:
    """Waits for progress. Where none came for `watchdog.seconds`, `watch` raises, or warns and waits on."""

    def __init__(self, config: WatchdogConfig, progress: Signal, warn: Callable[[str], None]) -> None:
        self._config, self._progress, self._warn = config, progress, warn

    async def over(self, work: Coroutine[Any, Any, R]) -> R:
        """Await `work` under this watch."""
        watching, working = asyncio.ensure_future(self.watch()), asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working in done else watching.result()
        finally:
            await cancel_and_wait((watching, working))

    async def watch(self) -> NoReturn:
        """Until cancelled. Raises StalledError, unless `watchdog.action` is warn."""
        silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(self._config.seconds):
                    await self._progress.wait()
            except TimeoutError:
                silent_s += self._config.seconds
                message = f"nothing was done for {silent_s:g} s (watchdog.seconds): {describe_blocked()}"
                if self._config.action == "fail":
                    raise StalledError(message) from None
                self._warn(message)
            else:
                silent_s = 0.0
