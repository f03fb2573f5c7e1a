"""Settings of a run's operation: cluster, failures, checkpoints and output."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge

from grpo.config.fields import Form, Hint, PositiveFloat, Settings


def _is_address(value: str) -> bool:
    return value == "auto" or re.fullmatch(r"[^/]+:\d+", value) is not None


@dataclass
class ClusterConfig(Settings):
    """The Ray cluster."""

    address: (
        Annotated[str, Form(_is_address, "auto or HOST:PORT"), Hint("leave it out for a cluster on this machine")]
        | None
    ) = None
    """Cluster to join, auto or HOST:PORT; null: start one on this machine for the run."""

    dashboard: bool = False
    """Serve Ray's dashboard on localhost, for a cluster that the run starts."""

    start_timeout_s: PositiveFloat = 600.0
    """Seconds that the actors may take to start."""

    wait_for_nodes_s: Annotated[float, Ge(0), Hint("0 waits for no node")] = 0.0
    """Seconds to wait for nodes that a joined cluster lacks; 0: fail at once."""


@dataclass
class DriverConfig(Settings):
    """The driver process, which runs the event loop."""

    slow_callback_ms: PositiveFloat = 200.0
    """Milliseconds after which a callback that blocks the event loop is reported with its stack."""


@dataclass
class WatchdogConfig(Settings):
    """Reaction to a run that makes no progress."""

    seconds: PositiveFloat = 1800.0
    """Seconds without a finished step after which the watchdog acts."""

    action: Literal["fail", "warn"] = "fail"
    """fail: end the run; warn: report what each task is blocked on, and keep waiting."""


@dataclass
class RecoveryConfig(Settings):
    """Replacement of actors that die or hang. Every train step refills the budgets."""

    max_restarts: Annotated[int, Ge(0), Hint("0 ends the run with the first actor that dies")] = 20
    """Restarts of actors between two steps; one more ends the run with the error behind it."""

    max_dropped_groups: Annotated[int, Ge(0), Hint("0 ends the run at the first one")] = 100
    """Groups dropped between two steps because their reward failed; one more ends the run."""

    health_interval_s: PositiveFloat = 10.0
    """Seconds between two health checks of a process."""

    health_timeout_s: PositiveFloat = 60.0
    """Seconds after which a process that does not answer a health check is killed and replaced."""

    collective_timeout_s: PositiveFloat = 600.0
    """Seconds that ranks of the trainer wait for each other."""


@dataclass
class CheckpointConfig(Settings):
    """Checkpoints, from which a stopped run resumes; see `resume`."""

    every: Annotated[int, Ge(0), Hint("0 writes none")] = 50
    """Steps between checkpoints; 0: none."""

    keep: Annotated[int, Ge(1), Hint("the newest one is never removed")] = 2
    """Newest checkpoints to keep."""

    dir: str | None = None
    """Folder of the checkpoints; null: `checkpoints` in the run's folder."""


@dataclass
class ObserveConfig(Settings):
    """Output of a run: log lines, report, timeline and sinks."""

    log_every: Annotated[int, Ge(1), Hint("1 prints every step")] = 1
    """Steps between printed lines, where stdout is no terminal."""

    report: bool = True
    """Write report.html at the end of the run."""

    timeline: bool = True
    """Write timeline.json, a trace of what each process waited for and computed, for ui.perfetto.dev."""

    timeline_mb: PositiveFloat = 64.0
    """MB of trace after which recording stops."""

    rollouts_every: Annotated[int, Ge(1), Hint("1 writes every group")] = 16
    """Groups between two that are written to rollouts.jsonl."""

    rollouts_tokens: bool = True
    """Include the log-probability and policy version of every token, about 20 bytes each."""

    sinks: dict[str, Any] = field(default_factory=dict)
    """Metric sinks and their options; a key is tensorboard, wandb, trackio, ray or `module:Class`."""
