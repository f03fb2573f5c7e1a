"""Trackio: a local database with a page of its own, `trackio show`; or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.observe.sinks.base import run_name

_BINS = 30


class TrackioSink:
    """One Trackio run per folder: a resumed run goes on with it. It lies where TRACKIO_DIR says, or in the home.

    Steps that a resumed run makes again stand there twice.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        /,
        *,
        project: str = "grpo",
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
    ) -> None:
        """`space_id` is the Space that it goes to; null: nothing leaves this machine."""
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=project,
            name=name or run_name(folder),
            group=group,
            space_id=space_id,
            config=dict(config),
            resume="allow",
            embed=False,  # in a notebook it would show itself
        )
        self._step = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        numbers = np.asarray(values, dtype=np.float64)
        if (numbers := numbers[np.isfinite(numbers)]).size:
            self._log(step, {name: self._trackio.Histogram(np_histogram=np.histogram(numbers, bins=_BINS))})

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            data = [list(row.values()) for row in rows]
            self._log(step, {name: self._trackio.Table(columns=list(rows[0]), data=data)})

    def summary(self, values: Mapping[str, Any]) -> None:
        data = [[name, str(value)] for name, value in values.items()]
        self._log(self._step, {"summary": self._trackio.Table(columns=["name", "value"], data=data)})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._step = step
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=step)
