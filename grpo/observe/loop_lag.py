"""How late the event loop is: the driver's own pulse."""

from __future__ import annotations

import asyncio

import numpy as np

_INTERVAL_S = 0.02


class LoopLag:
    """Sleeps and measures by how much each sleep overran: that long no other coroutine could run either."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []

    async def watch(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self._lags_s.append(loop.time() - due)

    def take_p99_ms(self) -> float:
        """The 99th percentile since the last call, in milliseconds."""
        lags_s, self._lags_s = self._lags_s, []
        return float(np.percentile(lags_s, 99)) * 1000 if lags_s else 0.0
