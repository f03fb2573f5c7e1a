"""Fail (or warn) when nothing progresses for `watchdog.seconds`; report what each task is blocked on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from grpo.config.operation import WatchdogConfig
from grpo.errors import StalledError
from grpo.telemetry.activity import describe_blocked
from grpo.utils.aio import Signal


class Watchdog:
    """Watches a progress signal. `action` "fail" raises StalledError, "warn" keeps watching.

    Example:
        report = await race(work, Watchdog(config.watchdog, progress, warn).watch())    # `race` is in utils/aio.py
    """

    def __init__(self, config: WatchdogConfig, progress: Signal, warn: Callable[[str], None]) -> None:
        self._config, self._progress, self._warn = config, progress, warn

    async def watch(self) -> NoReturn:
        """Watch until cancelled. Raises StalledError, unless `watchdog.action` is "warn".

        Consumes: the progress signal.
        Waits for: progress, at most `watchdog.seconds` at a time.
        Unblocked by: a trained step, or an answer of an evaluation.
        Ends when: cancelled.
        """
        silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(self._config.seconds):
                    await self._progress.wait()
            except TimeoutError:
                silent_s += self._config.seconds
                message = f"no progress for {silent_s:g} s (watchdog.seconds). {describe_blocked()}"
                if self._config.action == "fail":
                    raise StalledError(message) from None
                self._warn(message)
            else:
                silent_s = 0.0
