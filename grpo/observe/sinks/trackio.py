"""Trackio: a local database with its own dashboard, `trackio show`; or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.observe.sinks.base import Rows, histogram_of, run_name, table_of


class TrackioSink:
    """One Trackio run per folder, which a resumed run continues. Data is stored in TRACKIO_DIR, or in the home folder.

    Steps that a resumed run repeats are stored twice.
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
        """`space_id` is the Space to upload to; null: nothing leaves this machine."""
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=project,
            name=name or run_name(folder),
            group=group,
            space_id=space_id,
            config=dict(config),
            resume="allow",
            embed=False,  # no dashboard in a notebook
        )
        self._step = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        if histogram := histogram_of(values):
            self._log(step, {name: self._trackio.Histogram(np_histogram=histogram)})

    def text(self, step: int, name: str, rows: Rows) -> None:
        if rows:
            self._log(step, {name: self._trackio.Table(**table_of(rows))})

    def summary(self, values: Mapping[str, Any]) -> None:
        rows = [{"name": name, "value": str(value)} for name, value in values.items()]
        self.text(self._step, "summary", rows)

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._step = step
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=step)
