"""The live view of a run in a terminal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NoReturn, Self

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType

from grpo.observe.terminal import Terminal, attended
from grpo.observe.view import Glance, Sample, View, Warned, held_out, sparkline
from grpo.types import EvaluationReport

_LOOK_EVERY_S = 1.0


class LiveDisplay:
    """Progress, the curve of the reward, every service and who waits, drawn four times a second by a thread.

    The event loop only sets what is to be drawn: a terminal that takes nothing, after Ctrl-S say, holds up no step.
    """

    def __init__(self, console: Console, max_steps: int, terminal: Terminal | None = None) -> None:
        """With a `terminal`, it is shown only while the process is in front there, and reads keys."""
        self._console, self._terminal = console, terminal
        self._view = View(max_steps)
        self._view.help = terminal is not None and terminal.keyboard is not None
        self._rewards: list[float] = []
        self._step = 0
        self._live: Live | None = None
        self._attention = ExitStack()

    def __enter__(self) -> Self:
        self._view.start()
        self._attention.enter_context(self._shown() if self._terminal is None else attended(self, self._terminal))
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.help = False  # what stays on the screen takes no keys
        self._attention.close()

    def show(self) -> None:
        # What was typed before was echoed: the first line would begin behind it, and be too long.
        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        # A new one every time: it would take the lines that others have written meanwhile for its own.
        # Rich would take over sys.stdout and sys.stderr too, and bring the chatter back onto the screen.
        self._live = Live(
            self._view, console=self._console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def press(self, key: str) -> None:
        if key == "s":
            self._view.shows_sample = not self._view.shows_sample

    def step(self, metrics: Mapping[str, float]) -> None:
        self._step = int(metrics["step"])
        self._rewards.append(metrics["reward/mean"])
        self._view.trained(dict(metrics), sparkline(self._rewards))

    def evaluated(self, report: EvaluationReport) -> None:
        self._view.held_out = held_out(report)

    def sampled(self, sample: Sample) -> None:
        self._view.sample = sample

    def warn(self, message: str) -> None:
        self._view.warned = Warned(message, self._step, time.perf_counter())
        self._console.print(f"warning: {message}", markup=False, highlight=False, style="yellow")

    async def watch(self, look: Callable[[], Glance]) -> NoReturn:
        while True:
            self._view.glance = look()
            await asyncio.sleep(_LOOK_EVERY_S)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        self.show()
        try:
            yield
        finally:
            self.hide()
