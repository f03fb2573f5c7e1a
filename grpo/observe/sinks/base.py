"""The interface of a sink, and helpers that the sinks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

HISTOGRAM_BINS = 30
Rows = Sequence[Mapping[str, Any]]


class Sink(Protocol):
    """A destination of metrics, made as `Class(folder, config, **options)` with the options from `observe.sinks`.

    `folder` is the run's, and the same again for a resumed run; `config` is the resolved config. A sink is made, called
    and closed in a thread of its own, so it may block and raise: see fanout.py. Import what it needs in `__init__`.

    Example:
        class CsvSink:  # observe.sinks={"my_sinks.CsvSink": {"name": "loss.csv"}}
            def __init__(self, folder: Path, config: Mapping[str, Any], /, *, name: str) -> None:
                self._file = (folder / name).open("a")

            def scalars(self, step: int, values: Mapping[str, float]) -> None:
                self._file.write(f"{step},{values['loss']}\\n")
            ...  # histogram, text, summary, close
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Write a distribution. `values` may be empty, or not finite."""

    def text(self, step: int, name: str, rows: Rows) -> None:
        """Write sample completions: `prompt`, `completion`, `reward`, `advantage`. All rows have the same keys."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the outcome of the run, at its end."""

    def close(self) -> None:
        """Flush and release everything."""


def run_name(folder: Path) -> str:
    """Return the default name of the run in this folder: its date and time."""
    return "/".join(folder.absolute().parts[-2:])


def finite(values: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    return numbers[np.isfinite(numbers)]


def histogram_of(values: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return counts and bin edges of the finite values; None without any."""
    numbers = finite(values)
    return np.histogram(numbers, bins=HISTOGRAM_BINS) if numbers.size else None


def table_of(rows: Rows) -> dict[str, list[Any]]:
    """Return `columns` and `data`, the arguments of a table in W&B and Trackio."""
    return {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
