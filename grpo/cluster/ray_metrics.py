"""Sink for Prometheus, through the metrics agent that Ray runs on every node."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
_REPEAT_S = 5.0


class RaySink:
    """The latest metrics as gauges on this node's metrics port: `ray_grpo_reward_mean{run="..."}`.

    Ray's agent drops a gauge that was not set for about twenty seconds, and a step may take longer: a thread sets all
    gauges every 5 s until the run ends.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], /, *, run: str | None = None) -> None:
        """`run` is the tag of the gauges; null: the name of the run's folder."""
        self._run = run or "/".join(folder.absolute().parts[-2:])
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()  # guards the values and the gauges
        self._values: dict[str, float] = {}
        self._closed = threading.Event()
        self._repeats = threading.Thread(target=self._repeat, name="ray-sink-repeats", daemon=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges. Raises RuntimeError when Ray exports no metrics."""
        if not self._gauges:  # the first step: by now the run has joined its cluster
            _check_agent()
            self._repeats.start()
        with self._lock:
            self._values |= {name: value for name, value in values.items() if math.isfinite(value)}
            self._set()

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Not exported: a histogram of Prometheus counts events over time, these are of one step."""

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Not exported: Prometheus stores numbers."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Not exported: the gauges hold the last metrics."""

    def close(self) -> None:
        self._closed.set()
        if self._repeats.is_alive():
            self._repeats.join()

    def _repeat(self) -> None:
        while not self._closed.wait(_REPEAT_S):
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
    """Return a valid Prometheus name, to which Ray prepends `ray_`."""
    return "grpo_" + re.sub(r"[^a-zA-Z0-9]+", "_", metric).strip("_")


def _check_agent() -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here and node["MetricsExportPort"] > 0:
            log.info("Prometheus metrics: http://%s:%d/metrics", node["NodeManagerAddress"], node["MetricsExportPort"])
            return
    raise RuntimeError("Ray exports no metrics on this node. Install them with: pip install 'ray[default]'")
