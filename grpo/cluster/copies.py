"""Copies that are brought to this node, of payloads that are made faster than they travel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class NewestCopy:
    """Holds on to a payload that has arrived until a newer one is here; one is under way at a time.

    Meanwhile only the newest waits its turn: those that it takes the place of are let go. `failed` is told why a
    payload did not arrive.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self.held: Any = None
        self._failed = failed
        self._coming: asyncio.Future[Any] | None = None
        self._waiting: Awaitable[Any] | None = None

    def bring(self, payload: Awaitable[Any]) -> None:
        """Have the copy made: `payload` gives it when it is awaited."""
        self._waiting = payload
        if self._coming is None:
            self._go_on()

    def _go_on(self) -> None:
        payload, self._waiting, self._coming = self._waiting, None, None
        if payload is not None:
            self._coming = asyncio.ensure_future(payload)
            self._coming.add_done_callback(self._arrived)

    def _arrived(self, copying: asyncio.Future[Any]) -> None:
        if copying.cancelled():  # the event loop ends
            return
        if (error := copying.exception()) is None:
            self.held = copying.result()
        else:
            self._failed(error)
        self._go_on()
