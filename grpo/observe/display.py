"""What a person sees while the run goes on: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console

from grpo.observe.live import LiveDisplay
from grpo.observe.terminal import terminal_behind
from grpo.observe.view import Glance, Sample, as_facts, held_out, tokens_per_s
from grpo.types import EvaluationReport


class Display(Protocol):
    """Shows steps and warnings. A context manager, so that a live view leaves the terminal as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, report: EvaluationReport) -> None: ...

    def sampled(self, sample: Sample) -> None:
        """A group has been finished of which there are texts."""
        ...

    def warn(self, message: str) -> None: ...

    async def watch(self, look: Callable[[], Glance]) -> None:
        """Call `look` for what the run does at the moment, as often as it is shown, until cancelled."""
        ...


def make_display(console: Console, max_steps: int, log_every: int) -> Display:
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, max_steps, terminal_behind(console.file, sys.stdin))
    return PlainDisplay(console, max_steps, log_every)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to tidy up."""

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, report: EvaluationReport) -> None: ...

    def sampled(self, sample: Sample) -> None: ...

    def warn(self, message: str) -> None: ...

    async def watch(self, look: Callable[[], Glance]) -> None: ...


class PlainDisplay:
    """One line every `log_every` steps, for pipes and log files."""

    def __init__(self, console: Console, max_steps: int, log_every: int) -> None:
        self._console, self._max_steps, self._log_every = console, max_steps, log_every
        self._started = time.perf_counter()
        self._steps = 0  # of this process: a resumed run begins in the middle

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to tidy up."""

    def step(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        self._steps += 1
        if step % self._log_every and step != self._max_steps:
            return
        left_s = (time.perf_counter() - self._started) / self._steps * (self._max_steps - step)
        shown = as_facts(metrics) | {"generator": tokens_per_s(metrics)}
        facts = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._print(f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}  {facts}  left {left_s:.0f} s")

    def evaluated(self, report: EvaluationReport) -> None:
        self._print(f"held-out reward {held_out(report)}")

    def sampled(self, sample: Sample) -> None:
        """They stand in rollouts.jsonl."""

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    async def watch(self, look: Callable[[], Glance]) -> None:
        """A pipe gets steps only."""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
