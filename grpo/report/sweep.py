"""Compare several runs, such as those of a sweep: a table for the terminal, and the page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from grpo.observe.terminal.output import PipeSafeConsole
from grpo.report.data import Record, RunRecord, differing, figures, read_attempt, runs_of
from grpo.report.page import in_order, write_report

log = logging.getLogger(__name__)
_WIDE = 200  # columns where stdout is no terminal
_NARROW, _SETTING_WIDTH = 100, 8


def show_sweep(folder: Path) -> None:
    """Print the table and write `comparison.html`; do nothing if no run started, since the errors say it all."""
    folders = runs_of(folder)
    if not any((run / "config.yaml").exists() for run in folders):
        return
    print_table(folders)
    try:
        print(f"comparison: {write_report([folder])}")
    except Exception as error:  # a broken report must not fail the runs
        log.exception("comparison failed")
        print(f"warning: comparison failed: {error}; run scripts/report.py {folder} to make one", file=sys.stderr)


def print_table(folders: Sequence[Path]) -> None:
    """Print the table. Raises ReportError when a folder holds no run."""
    screen = PipeSafeConsole() if sys.stdout.isatty() else PipeSafeConsole(width=_WIDE)
    screen.print(table_of([read_attempt(run) for run in folders], narrow=screen.width < _NARROW))


def table_of(runs: Sequence[RunRecord], *, narrow: bool = False) -> Table:
    """Return a table with a row per run: the settings that differ, and the outcome."""
    runs = in_order(runs)
    settings = differing(runs)
    table = Table(box=SIMPLE_HEAD, padding=0 if narrow else (0, 1), pad_edge=False)
    table.add_column("run", no_wrap=True)
    for name in settings:
        table.add_column(_short(name, settings), overflow="fold", min_width=_SETTING_WIDTH)
    for name in ("status", "steps", "reward", "held-out", "s/step", "trainer waits", "tokens/s"):
        table.add_column(name.replace(" ", "\n"), justify="left" if name == "status" else "right", no_wrap=True)
    for place, run in enumerate(runs):
        values = (str(each[place]) for each in settings.values())
        table.add_row(run.folder.name, *values, *_cells(figures(run)))
    return table


def _short(name: str, names: Iterable[str]) -> str:
    """Shorten `trainer.lr` to `lr` if that is unambiguous."""
    last = name.rpartition(".")[2]
    return last if sum(each.rpartition(".")[2] == last for each in names) == 1 else name


def _cells(result: Record) -> list[str]:
    return [
        result["status"].partition(":")[0],
        str(result["steps"]),
        _change(result["reward_first"], result["reward_last"]),
        _change(result["eval_first"], result["eval_last"]),
        _number(result["step_s"], ".2f"),
        _number(result["trainer_wait_fraction"], ".0%"),
        _number(result["tokens_per_s"], ",.0f"),
    ]


def _change(first: Any, last: Any) -> str:
    if first is None and last is None:
        return _number(None, "")
    return f"{_number(first, '.2f')}->{_number(last, '.2f')}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
