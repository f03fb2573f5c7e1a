"""From the records of single runs to the table of a comparison."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import fmean, median
from typing import Any

import torch
from rich.table import Table

Record = dict[str, Any]  # one run: its setting and what came of it


@dataclass(frozen=True)
class Setting:
    """One run of the comparison."""

    loss: str
    correction: str
    age: int  # buffer.max_policy_age
    seed: int

    def __str__(self) -> str:
        return f"{self.loss}, correction {self.correction}, age {self.age}, seed {self.seed}"


def cell(records: Sequence[Record]) -> str:
    """The median run of a setting: steps and seconds to the target, or how far it came. Failed ones are named."""
    good = [record for record in records if record["error"] is None]
    errors = [record["error"].partition(":")[0] for record in records if record["error"] is not None]
    failed = [f"{len(errors)} failed: {', '.join(sorted(set(errors)))}"] if errors else []
    return "; ".join(([_median_run(good)] if good else []) + failed)


def _median_run(records: Sequence[Record]) -> str:
    """A run that did not reach the target counts as one that takes for ever; it is said that there are such."""
    steps = median(math.inf if record["reached_step"] is None else record["reached_step"] for record in records)
    reached = sum(record["reached_step"] is not None for record in records)
    share = f", {reached} of {len(records)}" if 0 < reached < len(records) else ""
    if math.isfinite(steps):
        seconds = median(math.inf if record["reached_s"] is None else record["reached_s"] for record in records)
        return f"{steps:g} ({seconds:.0f} s){share}"
    best = [math.nan if record["reward_best"] is None else record["reward_best"] for record in records]
    return f">{records[0]['max_steps']}, best {median(best):.2f}{share}"


def rows(settings: Iterable[Setting], found: Mapping[Setting, Record]) -> list[list[str]]:
    """The table, its head first: a line for each loss and correction, a column for each age; then the ages seen."""
    settings = list(settings)
    losses, corrections, ages, seeds = (
        list(dict.fromkeys(getattr(setting, name) for setting in settings))
        for name in ("loss", "correction", "age", "seed")
    )

    def records(age: int, correction: str, of: Sequence[str]) -> list[Record]:
        wanted = (Setting(loss, correction, age, seed) for loss in of for seed in seeds)
        return [found[setting] for setting in wanted if setting in found]

    table = [["loss", "correction", *(f"age {age}" for age in ages)]]
    for loss in losses:
        for correction in corrections:
            cells = [cell(records(age, correction, [loss])) for age in ages]
            table.append([loss if correction == corrections[0] else "", correction, *cells])
    for correction in corrections:
        means = [_mean_age(records(age, correction, losses)) for age in ages]
        table.append(["mean age seen" if correction == corrections[0] else "", correction, *means])
    return table


def _mean_age(records: Sequence[Record]) -> str:
    ages = [record["age_mean"] for record in records if record["age_mean"] is not None]
    return f"{fmean(ages):.2f}" if ages else ""


def on_screen(table: Sequence[Sequence[str]]) -> Table:
    """A line under each loss."""
    screen = Table(*table[0])
    for line, below in zip(table[1:], [*table[2:], table[0]], strict=True):
        screen.add_row(*line, end_section=bool(below[0]))
    return screen


def page(table: Sequence[Sequence[str]], title: str, command: str, machine: str) -> str:
    """The table and how it was made, in Markdown."""
    head, *body = (f"| {' | '.join(line)} |" for line in table)
    lines = [
        "# Losses compared",
        "",
        f"{title},",
        "by loss, correction and `buffer.max_policy_age`.",
        "",
        head,
        "|" + "---|" * len(table[0]),
        *body,
        "",
        "Seconds are those of the train steps, evaluations apart. Where not all seeds got there, it is said how many",
        "did; where the median did not, the steps that there were and the best held-out reward. At age 0 there is",
        "nothing to correct. The mean age is over all train steps, also those at the start, when nothing is old yet.",
        "Held-out prompts are answered every fifth step, and a run of many coroutines is not reproducible to the last",
        "digit: differences of ten steps say little.",
        "",
        f"Made on {date.today()} with {machine}, each in one process with one thread for the trainer and one for the",
        f"generator, Python {platform.python_version()}, torch {torch.__version__}:",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)
