"""`events.jsonl`: what befell a run, each with the moment at which it did."""

from __future__ import annotations

from collections.abc import Callable

from grpo.failures import Death
from grpo.observe.run_dir import RunDirectory


class Events:
    """Grows while the run goes on. `at_s` counts as `wall_s` of the metrics and the times of the timeline do."""

    def __init__(self, run_dir: RunDirectory, run_s: Callable[[float], float]) -> None:
        """`run_s` makes `at_s` of a time of time.perf_counter."""
        self._run_dir, self._run_s = run_dir, run_s

    def died(self, death: Death) -> None:
        self._add("died", self._run_s(death.at), actor=death.actor, error=death.error)

    def is_back(self, death: Death) -> None:
        """A replacement serves, `after_s` after the death."""
        assert death.back_s is not None
        self._add("back", self._run_s(death.at + death.back_s), actor=death.actor, after_s=death.back_s)

    def resumed(self, step: int, at_s: float) -> None:
        """The run goes on with what it was after `step`."""
        self._add("resumed", at_s, step=step)

    def _add(self, event: str, at_s: float, **about: object) -> None:
        self._run_dir.append("events.jsonl", {"event": event, "at_s": round(at_s, 4), **about})
