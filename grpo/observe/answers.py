"""What a person sees of an evaluation without a training: how far it is, and what came out."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from grpo.types import EvaluationReport

_LINES = 10  # where stdout is no terminal


class AnswerProgress:
    """Prompts answered so far: a bar in a terminal, a line for every tenth of them elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._bar = Progress(
            TextColumn("[bold]prompts"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            redirect_stdout=False,  # stdout leads into the log, and stays there
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
        tenths = self._done * _LINES // self._total
        if not self._console.is_terminal and tenths > (self._done - 1) * _LINES // self._total:
            self._console.print(f"prompts {self._done}/{self._total}", highlight=False)


def evaluation_table(report: EvaluationReport) -> Table:
    """The numbers of an evaluation, one a row."""
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
