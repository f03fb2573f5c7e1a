"""The folder a run leaves behind. Writing happens in a thread: the event loop never waits for a disk."""

from __future__ import annotations

import json
import logging
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo.types import ConfigError

log = logging.getLogger(__name__)


class RunDirectory:
    """`metrics.jsonl`, `rollouts.jsonl`, `summary.json` and whatever else is written, below one path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".writable").touch()
            (path / ".writable").unlink()
        except OSError as error:
            raise ConfigError(
                f"can't write to {path}: {error.strerror}; name another folder", key="hydra.run.dir"
            ) from error
        if any((path / name).exists() for name in ("metrics.jsonl", "completions.jsonl")):
            raise ConfigError(f"{path} already holds a run; name another folder", key="hydra.run.dir")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="run-dir")
        self.write_errors = 0

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Queue one line of a jsonl file."""
        self._submit(self._append, name, record)

    def write(self, name: str, text: str) -> None:
        """Queue a whole file, replaced at once."""
        self._submit(self._replace, name, text)

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        self.write(name, to_json(record, indent=2) + "\n")

    def close(self) -> None:
        """Wait until everything queued is on disk."""
        self._writer.shutdown()

    def _submit(self, *work: Any) -> None:
        self._writer.submit(*work).add_done_callback(self._count_error)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def _count_error(self, written: Future[None]) -> None:
        """A full disk must not end the training; it is logged, and the count stands in the summary."""
        if error := written.exception():
            self.write_errors += 1
            log.error("could not write to %s: %s", self.path, error)


def to_json(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON in which a number that is not finite becomes null, so that every reader can parse it."""
    return json.dumps(_finite(record), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
