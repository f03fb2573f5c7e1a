"""TensorBoard: event files in the run's folder, written by torch's SummaryWriter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.observe.sinks.base import HISTOGRAM_BINS, Rows, finite, table_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes `tensorboard/` in the run's folder; open it, or many runs at once, with `tensorboard --logdir`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], /, *, subfolder: str = "tensorboard") -> None:
        from torch.utils.tensorboard import SummaryWriter, summary

        self._make_writer, self._text_summary = SummaryWriter, summary.text
        self._folder = folder / subfolder
        self._config = f"```\n{json.dumps(config, indent=2, default=str)}\n```"
        self._open_writer: SummaryWriter | None = None
        self._step = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        if (numbers := finite(values)).size:
            writer = self._writer(step)
            writer.add_histogram(name, numbers, step, bins=HISTOGRAM_BINS)
            writer.flush()

    def text(self, step: int, name: str, rows: Rows) -> None:
        if rows:
            self._add_text(step, name, _markdown(rows))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._add_text(self._step, "summary", _markdown([{"": name, "value": each} for name, each in values.items()]))

    def close(self) -> None:
        if self._open_writer is not None:
            self._open_writer.close()

    def _writer(self, step: int) -> SummaryWriter:
        """Return the writer, opened at the first step, whose number it needs.

        `purge_step` hides what an earlier process of this run wrote of this step and later ones.
        """
        self._step = step
        if self._open_writer is None:
            self._open_writer = self._make_writer(self._folder, purge_step=step)
            self._add_text(step, "config", self._config)
        return self._open_writer

    def _add_text(self, step: int, name: str, markdown: str) -> None:
        writer = self._writer(step)
        summary = self._text_summary(name, markdown)
        summary.value[0].tag = name  # add_text would append "/text_summary"
        writer._get_file_writer().add_summary(summary, step)
        writer.flush()


def _markdown(rows: Rows) -> str:
    """Format rows with the same keys as a Markdown table."""
    if not rows:
        return ""
    table = table_of(rows)
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["data"]]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
