"""An event loop whose clock jumps to the next timer: hours of waiting take as long as the code between the waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

R = TypeVar("R")

_PATIENCE_S = 5.0  # for threads, in real time, where no timer is left


def run_in_virtual_time(work: Coroutine[Any, Any, R]) -> R:
    """`asyncio.run` with a clock that starts at 0; `asyncio.get_running_loop().time()` reads it.

    Raises RuntimeError when everybody waits for somebody else, so that no time could ever end it.
    """
    with asyncio.Runner(loop_factory=_VirtualTimeLoop) as runner:
        return runner.run(work)


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now_s

    def jump(self, seconds: float) -> None:
        self._now_s += seconds


class _JumpingSelector(selectors.BaseSelector):
    """Where the loop would sleep until its next timer, the time of that timer comes at once."""

    def __init__(self, loop: _VirtualTimeLoop) -> None:
        self._loop, self._selector = loop, selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._selector.select(_PATIENCE_S if timeout is None else 0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for another one: no time will ever end this")
        if not ready and timeout:
            self._loop.jump(timeout)
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        self._selector.close()
