"""Progress of a run or an evaluation: a live view in a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.progress import Progress
from rich.segment import ControlType
from rich.table import Table

from grpo.observe.terminal.job_control import Terminal, foreground_terminal, terminal_behind
from grpo.observe.terminal.view import (
    LastWarning,
    RunStatus,
    Sample,
    View,
    as_facts,
    held_out,
    progress_columns,
    sparkline,
    tokens_per_s,
)
from grpo.types import EvaluationReport

_REFRESH_STATUS_S = 1.0
_PROGRESS_LINES = 10  # of an evaluation where stdout is no terminal


class Display:
    """Shows steps and warnings; this base class shows nothing. A context manager that restores the terminal."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to restore."""

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a trained step."""

    def evaluated(self, report: EvaluationReport) -> None:
        """Show an evaluation."""

    def sampled(self, sample: Sample) -> None:
        """Show a finished group whose texts were kept."""

    def warn(self, message: str) -> None:
        """Show a warning."""

    async def watch(self, look: Callable[[], RunStatus]) -> None:
        """Call `look` for the run's status as often as it is shown, until cancelled."""


def make_display(console: Console, max_steps: int, log_every: int) -> Display:
    """Return a live view where the main thread has a terminal, plain lines elsewhere: a live view handles signals."""
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, max_steps, terminal_behind(console.file, sys.stdin))
    return PlainDisplay(console, max_steps, log_every)


class PlainDisplay(Display):
    """One line every `log_every` steps, for pipes and log files. Samples are in rollouts.jsonl."""

    def __init__(self, console: Console, max_steps: int, log_every: int) -> None:
        self._console, self._max_steps, self._log_every = console, max_steps, log_every
        self._started = time.perf_counter()
        self._steps = 0  # of this process: a resumed run starts in the middle

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

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

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(Display):
    """Progress, reward curve, services and waiting coroutines, drawn four times a second by a thread.

    The event loop only sets attributes of the view: a terminal that is blocked, by Ctrl-S say, delays no step.
    """

    def __init__(self, console: Console, max_steps: int, terminal: Terminal | None = None) -> None:
        """With a `terminal`, draw only while the process is in its foreground, and read keys."""
        self._console, self._terminal = console, terminal
        self._view = View(max_steps)
        self._view.help = terminal is not None and terminal.keyboard is not None
        self._rewards: list[float] = []
        self._step = 0
        self._live: Live | None = None
        self._attached = ExitStack()

    def __enter__(self) -> Self:
        self._view.start()
        self._attached.enter_context(
            self._always_shown() if self._terminal is None else foreground_terminal(self, self._terminal)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.help = False  # the last frame stays on the screen, where keys do nothing
        self._attached.close()

    def show(self) -> None:
        # Text typed before was echoed: the first line would start behind it and be too long.
        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        # A new Live every time: an old one would overwrite lines that other programs have written meanwhile.
        # Rich must not redirect sys.stdout and sys.stderr: that would bring the log back onto the screen.
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
        self._view.last_warning = LastWarning(message, self._step, time.perf_counter())
        self._console.print(f"warning: {message}", markup=False, highlight=False, style="yellow")

    async def watch(self, look: Callable[[], RunStatus]) -> None:
        """Refresh the run's status.

        Consumes: `look()`.
        Waits for: a second between two looks.
        Unblocked by: the clock.
        Ends when: cancelled.
        """
        while True:
            self._view.status = look()
            await asyncio.sleep(_REFRESH_STATUS_S)

    @contextmanager
    def _always_shown(self) -> Iterator[None]:
        self.show()
        try:
            yield
        finally:
            self.hide()


class AnswerProgress:
    """Prompts answered so far in an evaluation: a bar in a terminal, else a line for every tenth of them."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._bar = Progress(
            *progress_columns("prompts"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            redirect_stdout=False,  # stdout is redirected into the log already
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("answers", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        self._done += 1
        self._bar.advance(self._task)
        lines = self._done * _PROGRESS_LINES // self._total
        if not self._console.is_terminal and lines > (self._done - 1) * _PROGRESS_LINES // self._total:
            self._console.print(f"prompts {self._done}/{self._total}", highlight=False)


def evaluation_table(report: EvaluationReport) -> Table:
    """Return a table with one number of the evaluation per row."""
    table = Table("held-out", "", show_header=False)
    table.add_row("reward", f"{report.reward_mean:.3f} ± {report.reward_stderr:.3f} (standard error)")
    for k, value in report.pass_at.items():
        table.add_row(f"pass@{k}", f"{value:.3f}")
    record = report.as_record()
    table.add_row("prompts", f"{report.prompts}")
    if report.prompts_left_out:
        table.add_row("left out", f"{report.prompts_left_out} (their reward failed; see run.log)")
    table.add_row("completions", f"{report.completion_count}")
    table.add_row("completion tokens", f"{record['completion_tokens_mean']:.1f} on average")
    table.add_row("truncated", f"{record['truncated_fraction']:.1%}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    table.add_row("tokens/s", f"{record['tokens_per_s']:,.0f}")
    return table
