"""What a sink is."""

# MERGED: From `observe.sinks` to the sinks of a run.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Takes a run's numbers somewhere. Made as `Class(folder, config, **options)` from what `observe.sinks` says of it.

    `folder` is the run's, a resumed run has it again; `config` is the resolved config. Made, called and closed in one
    thread of its own, where it may take its time and raise what it likes: see fanout.py. It imports what it needs when
    it is made.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """How values lie; may be empty, or not finite."""

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sample completions: `prompt`, `completion`, `reward`, `advantage`. All rows have the same keys."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """What came out of the run, at its end."""

    def close(self) -> None:
        """Leave everything where it belongs."""


def run_name(folder: Path) -> str:
    """What a run in this folder is called where nobody gave it a name: its date and time, by default."""
    return "/".join(folder.absolute().parts[-2:])
