"""Where a run goes on from, and whether its settings still allow it. All of it is found before a cluster is started."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import RunConfig
from grpo.learner.checkpoint import checkpoints, latest_good, load_progress, verify
from grpo.types import CheckpointError, ConfigError

_DATED = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d$")  # the folder that a run gets where none is named

# Keys, or groups of them, that a resumed run may have otherwise. Everything else shapes what is learned.
_FREE = (
    "cluster", "watchdog", "recovery", "checkpoint", "observe", "eval", "generator", "resume", "dry_run",
    "reward.on_error", "reward.timeout_s", "reward.memory_gb", "reward.workers", "reward.replicas", "reward.num_cpus",
    "reference", "rollout.concurrency", "trainer.max_steps", "trainer.micro_batch_tokens",
    "trainer.gradient_checkpointing", "trainer.max_nonfinite_steps", "trainer.snapshot_every",
    "trainer.num_cpus", "trainer.num_gpus", "trainer.threads",
)  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint, what it says of the run, and the folder in which the run goes on."""

    path: Path
    folder: Path
    progress: Mapping[str, Any]

    @property
    def step(self) -> int:
        step: int = self.progress["step"]
        return step


def find_resume_point(config: RunConfig, folder: Path) -> tuple[ResumePoint | None, list[str]]:
    """What `resume` asks for, and warnings; None where `auto` finds no run to go on with.

    `folder` is where a new run would go. Raises ConfigError when there is nothing at a path that was named, and
    CheckpointError when all that is there is broken.
    """
    if config.resume is None:
        return None, []
    if config.resume != "auto":
        return _at(Path(config.resume).expanduser(), folder)
    if config.checkpoint.dir is not None:
        candidates = [Path(config.checkpoint.dir).expanduser()]
    else:
        candidates = [folder / "checkpoints", *_unfinished_beside(config, folder)]
    for candidate in candidates:
        if checkpoints(candidate):
            return _newest_in(candidate, folder)
    return None, ["resume=auto: found no run to go on with; starting a new one"]


def check_compatible(config: RunConfig, progress: Mapping[str, Any]) -> None:
    """Raise ConfigError with the list of settings that differ from those of the checkpoint and may not."""
    before, now = dict(_leaves(progress["config"])), dict(_leaves(json.loads(json.dumps(dataclasses.asdict(config)))))
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint has other settings: {'; '.join(differing)}; set them back, or start a new run",
            key="resume",
        )
    if progress["step"] >= config.trainer.max_steps:
        raise ConfigError(
            f"the checkpoint is of step {progress['step']} and there are {config.trainer.max_steps} steps: "
            "nothing is left to do; raise it to go on",
            key="trainer.max_steps",
        )


def _at(path: Path, new_folder: Path) -> tuple[ResumePoint, list[str]]:
    """A run folder, its folder of checkpoints, or one checkpoint."""
    for folder in (path / "checkpoints", path):
        if checkpoints(folder):
            return _newest_in(folder, new_folder)
    if not (path / "progress.json").exists():
        raise ConfigError(
            f"no checkpoint at {str(path)!r}; name a run's folder or one of its checkpoints", key="resume"
        )
    verify(path)
    return _point(path, new_folder), []


def _newest_in(checkpoint_folder: Path, new_folder: Path) -> tuple[ResumePoint, list[str]]:
    path, warnings = latest_good(checkpoint_folder)
    if path is None:
        raise CheckpointError(f"resume: no checkpoint in {checkpoint_folder} can be used: {'; '.join(warnings)}")
    return _point(path, new_folder), warnings


def _point(path: Path, new_folder: Path) -> ResumePoint:
    """The run goes on in its own folder; in a new one where that is gone."""
    path = path.resolve()
    progress = load_progress(path)
    for folder in (path.parent.parent, Path(progress["run_folder"])):
        if (folder / "config.yaml").exists():
            return ResumePoint(path, folder, progress)
    return ResumePoint(path, new_folder, progress)


def _unfinished_beside(config: RunConfig, folder: Path) -> Iterator[Path]:
    """Checkpoints of runs of the same model and task that were not completed, the newest run first."""
    if not _DATED.search(str(folder)):
        return
    for run in sorted(folder.parents[1].glob("*/*"), reverse=True):
        newest, *_ = [*checkpoints(run / "checkpoints"), None]
        if newest is None or run == folder or _completed(run):
            continue
        before = load_progress(newest)["config"]
        if before["task"]["target"] == config.task.target and config.model.path in (None, before["model"]["path"]):
            yield run / "checkpoints"


def _completed(run: Path) -> bool:
    summary = run / "summary.json"
    return summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["status"] == "completed"


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
