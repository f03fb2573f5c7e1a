"""Resuming: find the checkpoint and check its settings against the config, before a cluster is started."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from grpo.checkpoint.store import checkpoints, find_checkpoint, load_progress
from grpo.config.renamed import upgrade
from grpo.config.schema import RunConfig
from grpo.errors import CheckpointError, ConfigError

_DATED = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d$")  # the default folder of a run
# Keys, or groups of keys, that a resumed run may change. Everything else affects what is learned.
_MUTABLE_KEYS = (
    "cluster", "watchdog", "recovery", "checkpoint", "observe", "eval", "generator", "weight_sync", "resume", "dry_run",
    "reward.on_error", "reward.timeout_s", "reward.memory_gb", "reward.workers", "reward.replicas", "reward.num_cpus",
    "filter.max_dropped_batches", "model.attention", "reference", "driver", "rollout.concurrency",
    "rollout.target_trainer_idle", "trainer.max_steps", "trainer.micro_batch_tokens", "trainer.packing",
    "trainer.gradient_checkpointing",
    "trainer.compile", "trainer.max_nonfinite_steps", "trainer.snapshot_every", "trainer.ranks", "trainer.num_cpus",
    "trainer.num_gpus", "trainer.threads",
)  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, the driver's state in it, and the folder in which the run continues.

    Example:
        point, warnings = find_resume_point(config, Path("outputs/2026-01-31/12-00-00"))
        if point is not None:
            check_compatible(config, point)     # raises ConfigError
            print(f"resuming after step {point.step} in {point.folder}")
    """

    path: Path
    folder: Path
    progress: Mapping[str, Any]
    in_place: bool
    """True if `folder` is the run's own folder, not a new one."""

    @property
    def step(self) -> int:
        step: int = self.progress["step"]
        return step

    def is_end_of(self, max_steps: int) -> bool:
        """Return whether nothing is left to do; a run that was stopped after its last step still lacks its summary."""
        return self.step > max_steps or (self.step == max_steps and (not self.in_place or is_completed(self.folder)))


def find_resume_point(config: RunConfig, folder: Path) -> tuple[ResumePoint | None, list[str]]:
    """Return the resume point for the setting `resume`, and warnings; None if `auto` finds no run to resume.

    `auto` searches `checkpoint.dir`, then `folder`, the folder of a new run. If `checkpoint.dir` is not set and
    `folder` is a dated default, it also searches the dated folders next to it, the newest first. Raises
    CheckpointError if a named path has no checkpoint, or if all checkpoints found are damaged.
    """
    if config.resume is None:
        return None, []
    if config.resume != "auto":
        return _resume_point(Path(config.resume).expanduser(), folder)
    candidates: Iterable[Path] = (folder / "checkpoints",)
    if config.checkpoint.dir is not None:
        candidates = (Path(config.checkpoint.dir).expanduser(), *candidates)
    else:
        candidates = chain(candidates, _unfinished_siblings(config, folder))
    for candidate in candidates:
        if checkpoints(candidate):
            return _resume_point(candidate, folder)
    return None, ["resume=auto: no run to resume was found; starting a new one"]


def archive_newer_checkpoints(point: ResumePoint) -> None:
    """Rename to `stale_*` the checkpoints written after the one from which the run is resumed in its own folder.

    They belong to an abandoned history. Under their old names `auto` would resume from them until the resumed run has
    written its next checkpoint.
    """
    for newer in takewhile(lambda path: path.resolve() != point.path, checkpoints(point.path.parent)):
        stale = newer.with_name(f"stale_{newer.name}")
        shutil.rmtree(stale, ignore_errors=True)
        newer.rename(stale)


def is_completed(run: Path) -> bool:
    """Return whether the run's summary says that it was completed."""
    try:
        return bool(json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "completed")
    except (OSError, ValueError, KeyError, TypeError):  # missing, or emptied by a power failure
        return False


def check_compatible(config: RunConfig, point: ResumePoint) -> None:
    """Raise ConfigError if settings that affect what is learned differ from the checkpoint's, or nothing is left to do.

    The message lists every such setting with both values.
    """
    before, now = dict(_leaves(_with_defaults(point.progress["config"]))), dict(_leaves(_as_json(config)))
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not any(key == mutable or key.startswith(f"{mutable}.") for mutable in _MUTABLE_KEYS)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint has other settings: {'; '.join(differing)}; set them back, or start a new run",
            key="resume",
        )
    if point.is_end_of(config.trainer.max_steps):
        raise ConfigError(
            f"nothing is left to do ({config.trainer.max_steps}, the checkpoint is of step {point.step}). Raise it.",
            key="trainer.max_steps",
        )


def _resume_point(source: Path, new_folder: Path) -> tuple[ResumePoint, list[str]]:
    """Resume from a run's folder, its folder of checkpoints, or a single checkpoint."""
    try:
        path, warnings = find_checkpoint(source)
    except CheckpointError as error:
        raise CheckpointError(f"resume: {error}") from error
    path = path.resolve()
    progress = load_progress(path)

    # The run continues in its own folder, which may have been moved since. A copied checkpoint has no run folder.
    if path.parent == Path(progress["config"]["checkpoint"]["dir"]).resolve():
        folder = Path(progress["run_folder"])
    else:
        folder = path.parent.parent
    in_place = (folder / "config.yaml").exists() and (folder / "ledger.jsonl").exists()
    return ResumePoint(path, folder if in_place else new_folder, progress, in_place), warnings


def _unfinished_siblings(config: RunConfig, folder: Path) -> Iterator[Path]:
    """Yield the checkpoint folders of unfinished runs of the same model and task, the newest run first."""
    if not _DATED.search(str(folder)):
        return
    model = config.model.path
    same_models = (model, os.path.abspath(os.path.expanduser(model))) if model else None
    for run in sorted(folder.parents[1].glob("*/*"), reverse=True):
        if run == folder or is_completed(run):
            continue
        for path in checkpoints(run / "checkpoints"):  # the newest readable one tells the run's settings
            try:
                before: Mapping[str, Any] = load_progress(path)["config"]
            except (CheckpointError, KeyError):
                continue
            same_task = before["task"]["target"] == config.task.target
            if same_task and (same_models is None or before["model"]["path"] in same_models):
                yield run / "checkpoints"
            break


def _with_defaults(before: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the config of an older version up to date: new names, and defaults for settings that it did not have."""
    before, _ = upgrade(before)
    return {
        name: {**default, **before.get(name, {})} if isinstance(default, dict) else before.get(name, default)
        for name, default in _as_json(RunConfig()).items()
    }


def _as_json(config: RunConfig) -> dict[str, Any]:
    """Return the config as a checkpoint gives it back: without tuples and integer keys."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
