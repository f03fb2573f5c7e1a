"""What came out of several runs, those of a sweep in particular: a table for the terminal, and the page."""

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
_WIDE = 200  # columns, where stdout is no terminal
_NARROW, _SETTING = 100, 8


def show_sweep(folder: Path) -> None:
    """Print the table and leave `comparison.html`; where no run began, the errors have said all."""
    folders = runs_of(folder)
    if not any((run / "config.yaml").exists() for run in folders):
        return
    print_table(folders)
    try:
        print(f"comparison: {write_report([folder])}")
    except Exception as error:  # the runs are not failed by their report
        log.exception("no comparison")
        print(f"warning: no comparison: {error}; scripts/report.py {folder} makes one", file=sys.stderr)


def print_table(folders: Sequence[Path]) -> None:
    """Raises ReportError when one of them is no run's."""
    screen = PipeSafeConsole() if sys.stdout.isatty() else PipeSafeConsole(width=_WIDE)
    screen.print(table_of([read_attempt(run) for run in folders], narrow=screen.width < _NARROW))


def table_of(runs: Sequence[RunRecord], *, narrow: bool = False) -> Table:
    """A run a row: what was typed for it and for no other, and how it went."""
    runs = in_order(runs)
    settings = differing(runs)
    table = Table(box=SIMPLE_HEAD, padding=0 if narrow else (0, 1), pad_edge=False)
    table.add_column("run", no_wrap=True)
    for name in settings:
        table.add_column(_short(name, settings), overflow="fold", min_width=_SETTING)
    for name in ("status", "steps", "reward", "held-out", "s/step", "trainer waits", "tokens/s"):
        table.add_column(name.replace(" ", "\n"), justify="left" if name == "status" else "right", no_wrap=True)
    for place, run in enumerate(runs):
        values = (str(each[place]) for each in settings.values())
        table.add_row(run.folder.name, *values, *_cells(figures(run)))
    return table


def _short(name: str, names: Iterable[str]) -> str:
    """`trainer.lr` as `lr`, where no other is called so."""
    last = name.rpartition(".")[2]
    return last if sum(each.rpartition(".")[2] == last for each in names) == 1 else name


def _cells(found: Record) -> list[str]:
    return [
        found["status"].partition(":")[0],
        str(found["steps"]),
        _change(found["reward_first"], found["reward_last"]),
        _change(found["eval_first"], found["eval_last"]),
        _number(found["step_s"], ".2f"),
        _number(found["trainer_wait_fraction"], ".0%"),
        _number(found["tokens_per_s"], ",.0f"),
    ]


def _change(first: Any, last: Any) -> str:
    if first is None and last is None:
        return _number(None, "")
    return f"{_number(first, '.2f')}->{_number(last, '.2f')}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
