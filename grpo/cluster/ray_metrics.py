"""Numbers for Prometheus, through the metrics agent that Ray runs on every node."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
_AGAIN_S = 5.0


class RaySink:
    """The last line of metrics as gauges on this node's metrics port: `ray_grpo_reward_mean{run="..."}`.

    Ray's agent forgets a gauge that was not set for some twenty seconds, and a step may take longer: a thread sets all
    of them again and again until the run has ended.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], /, *, run: str | None = None) -> None:
        """`run` is what the gauges are tagged with; null: the run's folder."""
        self._run = run or "/".join(folder.absolute().parts[-2:])
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()  # guards the values and the gauges
        self._values: dict[str, float] = {}
        self._closed = threading.Event()
        self._repeats = threading.Thread(target=self._repeat, name="ray-sink-repeats", daemon=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Raises RuntimeError when nobody can ever see them. By the first step the run has joined its cluster."""
        if not self._gauges:
            _check_agent()
            self._repeats.start()
        with self._lock:
            self._values |= {name: value for name, value in values.items() if math.isfinite(value)}
            self._set()

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Prometheus' histograms count what happens; these are of one step."""

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prometheus holds numbers."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The last line of metrics says as much."""

    def close(self) -> None:
        self._closed.set()
        if self._repeats.is_alive():
            self._repeats.join()

    def _repeat(self) -> None:
        while not self._closed.wait(_AGAIN_S):
            with self._lock:
                self._set()

    def _set(self) -> None:
        from ray.util.metrics import Gauge

        for name, value in self._values.items():
            if name not in self._gauges:
                gauge = Gauge(gauge_name(name), f"{name}: see docs/metrics.md", tag_keys=("run",))
                self._gauges[name] = gauge.set_default_tags({"run": self._run})
            self._gauges[name].set(value)


def gauge_name(metric: str) -> str:
    """A name that Prometheus takes; Ray puts `ray_` before it."""
    return "grpo_" + re.sub(r"[^a-zA-Z0-9]+", "_", metric).strip("_")


def _check_agent() -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here and node["MetricsExportPort"] > 0:
            log.info("for Prometheus: http://%s:%d/metrics", node["NodeManagerAddress"], node["MetricsExportPort"])
            return
    raise RuntimeError("Ray's agent on this node exports no metrics; its Ray needs pip install 'ray[default]'")
