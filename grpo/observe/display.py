"""What a person sees while the run goes on: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from grpo.types import EvaluationReport

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 48


class Display(Protocol):
    """Shows steps and warnings. A context manager, so that a live view leaves the terminal as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, report: EvaluationReport) -> None: ...

    def warn(self, message: str) -> None: ...


def make_display(console: Console, max_steps: int, log_every: int) -> Display:
    return LiveDisplay(console, max_steps) if console.is_terminal else PlainDisplay(console, max_steps, log_every)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to tidy up."""

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, report: EvaluationReport) -> None: ...

    def warn(self, message: str) -> None: ...


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
        facts = "  ".join(f"{name} {value}" for name, value in _facts(metrics).items())
        self._print(f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}  {facts}  left {left_s:.0f} s")

    def evaluated(self, report: EvaluationReport) -> None:
        self._print(f"held-out reward {held_out(report)}")

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay:
    """A progress bar, the curve of the reward, and the numbers of the last step."""

    def __init__(self, console: Console, max_steps: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=max_steps, start=False)
        self._rewards: list[float] = []
        self._facts: dict[str, str] = {}
        self._held_out: dict[str, str] = {}  # the last evaluation, as one more fact
        # Rich would take over sys.stdout and sys.stderr too, and bring the chatter back onto the screen.
        self._live = Live(
            self._progress, console=console, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Self:
        self._progress.start_task(self._task)
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def step(self, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=metrics["step"])
        self._rewards.append(metrics["reward/mean"])
        self._facts = _facts(metrics)
        self._facts["reward"] += f"  [green]{sparkline(self._rewards)}"
        self._show()

    def evaluated(self, report: EvaluationReport) -> None:
        self._held_out = {"held-out": held_out(report)}
        self._show()

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", markup=False, style="yellow")

    def _show(self) -> None:
        facts = Table.grid(padding=(0, 2))
        for name, value in (self._facts | self._held_out).items():
            facts.add_row(f"[dim]{name}", value)
        self._live.update(Group(self._progress, facts))


def sparkline(values: list[float]) -> str:
    """The last values as block characters between the smallest and the largest of them all."""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values[-_SPARKS:])


def held_out(report: EvaluationReport) -> str:
    """One evaluation in a line: mean and standard error, the largest k of pass@k, and when."""
    k = max(report.pass_at)
    passed = f"  pass@{k} {report.pass_at[k]:.3f}" if k > 1 else ""
    return f"{report.reward_mean:.3f} ± {report.reward_stderr:.3f}{passed}  after step {report.step}"


def _facts(metrics: Mapping[str, float]) -> dict[str, str]:
    return {
        "reward": f"{metrics['reward/mean']:.3f}",
        "loss": f"{metrics['loss']:+.4f}",
        "age": f"{metrics['policy_age/mean']:.2f} (max {metrics['policy_age/max']:.0f})",
        "trainer wait": f"{metrics['time/trainer_wait_s'] / metrics['time/step_s']:4.0%}",
        "generator": f"{metrics['generator/tokens_per_s']:,.0f} tokens/s",
    }
