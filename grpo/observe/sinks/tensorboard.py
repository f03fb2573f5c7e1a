"""TensorBoard's event files, written with the tensorboard package alone: torch's writer imports far more."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_BINS = 30


class TensorBoardSink:
    """Writes `tensorboard/` in the run's folder: `tensorboard --logdir` of that, or of many runs."""

    def __init__(self, folder: Path, config: Mapping[str, Any], /, *, subfolder: str = "tensorboard") -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
        # Read in the order of their names; the process tells apart what began in the same second.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._writer = RecordWriter((folder / subfolder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        self._step: int | None = None
        self._config: str | None = f"```\n{json.dumps(config, indent=2, default=str)}\n```"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.Summary.Value(tag=k, simple_value=v) for k, v in values.items()])

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        numbers = np.asarray(values, dtype=np.float64)
        if not (numbers := numbers[np.isfinite(numbers)]).size:
            return
        counts, edges = np.histogram(numbers, bins=_BINS)
        histogram = self._summary.HistogramProto(
            min=numbers.min(),
            max=numbers.max(),
            num=numbers.size,
            sum=numbers.sum(),
            sum_squares=numbers @ numbers,
            bucket_limit=edges,
            bucket=[0, *counts],  # a bucket has only its right edge: an empty one gives the first its left
        )
        self._add(step, [self._summary.Summary.Value(tag=name, histo=histogram)])

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self._add(step, [self._text(name, _table(rows))])

    def summary(self, values: Mapping[str, Any]) -> None:
        shown = [{"": name, "value": value} for name, value in values.items()]
        self._add(self._step or 0, [self._text("summary", _table(shown))])

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        if self._step is None:
            # What an earlier process of this run wrote of this step and later ones is not shown any more.
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(step=step, session_log=start)
            values = [self._text("config", self._config or ""), *values]
        self._step, self._config = step, None
        self._write(step=step, summary=self._summary.Summary(value=values))

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()

    def _text(self, name: str, markdown: str) -> Any:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        value = self._summary.Summary.Value(tag=name, metadata=self._summary.SummaryMetadata(plugin_data=plugin))
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.string_val.append(markdown.encode())
        value.tensor.tensor_shape.dim.add(size=1)
        return value


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table of Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
