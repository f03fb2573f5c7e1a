"""Where a run goes on from, and whether its settings still allow it. All of it is found before a cluster is started."""

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

_DATED = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d$")  # the folder that a run gets where none is named
# Keys, or groups of them, that a resumed run may have otherwise. Everything else shapes what is learned.
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
    """A checkpoint, what it says of the run, and the folder in which the run goes on: its own, or a new one."""

    path: Path
    folder: Path
    progress: Mapping[str, Any]
    in_place: bool  # the folder is the run's own

    @property
    def step(self) -> int:
        step: int = self.progress["step"]
        return step

    def is_end_of(self, max_steps: int) -> bool:
        """Whether nothing is left to do. A run that was stopped after its last step still owes its summary."""
        return self.step > max_steps or (self.step == max_steps and (not self.in_place or is_completed(self.folder)))


def find_resume_point(config: RunConfig, folder: Path) -> tuple[ResumePoint | None, list[str]]:
    """What `resume` asks for, and warnings; None where `auto` finds no run to go on with.

    `auto` looks in `checkpoint.dir`, then in `folder`, where a new run would go, and where that is a dated one among
    the others, unless `checkpoint.dir` is set. Raises CheckpointError when nothing is at a path that was named, or all
    that is there is broken.
    """
    if config.resume is None:
        return None, []
    if config.resume != "auto":
        return _found(Path(config.resume).expanduser(), folder)
    candidates: Iterable[Path] = (folder / "checkpoints",)
    if config.checkpoint.dir is not None:
        candidates = (Path(config.checkpoint.dir).expanduser(), *candidates)
    else:
        candidates = chain(candidates, _unfinished_beside(config, folder))
    for candidate in candidates:
        if checkpoints(candidate):
            return _found(candidate, folder)
    return None, ["resume=auto: found no run to go on with; starting a new one"]


def archive_newer_checkpoints(point: ResumePoint) -> None:
    """Rename the checkpoints that were written after the one that the run goes on from in its own folder.

    They are of a history that ends here. Left as they are, they would be newer than the next ones until those are
    written, and `auto` would go on from them.
    """
    for newer in takewhile(lambda path: path.resolve() != point.path, checkpoints(point.path.parent)):
        behind = newer.with_name(f"stale_{newer.name}")
        shutil.rmtree(behind, ignore_errors=True)
        newer.rename(behind)


def is_completed(run: Path) -> bool:
    """Whether the summary in a run's folder says so."""
    try:
        return bool(json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "completed")
    except (OSError, ValueError, KeyError, TypeError):  # none, or a power failure has left it empty
        return False


def check_compatible(config: RunConfig, point: ResumePoint) -> None:
    """Raise ConfigError with the list of settings that differ from those of the checkpoint and may not.

    And when nothing is left to do.
    """
    before, now = dict(_leaves(_with_defaults(point.progress["config"]))), dict(_leaves(_as_json(config)))
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _is_mutable(key)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint has other settings: {'; '.join(differing)}; set them back, or start a new run",
            key="resume",
        )
    if point.is_end_of(config.trainer.max_steps):
        raise ConfigError(
            f"the checkpoint is of step {point.step} and there are {config.trainer.max_steps} steps: "
            "nothing is left to do; raise it to go on",
            key="trainer.max_steps",
        )


def _found(source: Path, new_folder: Path) -> tuple[ResumePoint, list[str]]:
    """A run's folder, its folder of checkpoints, or one checkpoint."""
    try:
        path, warnings = find_checkpoint(source)
    except CheckpointError as error:
        raise CheckpointError(f"resume: {error}") from error
    return _point(path, new_folder), warnings


def _point(path: Path, new_folder: Path) -> ResumePoint:
    """The run goes on in its own folder, which may have been moved; in a new one where that is gone.

    A copy of a checkpoint is of no run folder: the original goes its own way.
    """
    path = path.resolve()
    progress = load_progress(path)
    if path.parent == Path(progress["config"]["checkpoint"]["dir"]).resolve():
        folder = Path(progress["run_folder"])
    else:
        folder = path.parent.parent
    in_place = (folder / "config.yaml").exists() and (folder / "ledger.jsonl").exists()
    return ResumePoint(path, folder if in_place else new_folder, progress, in_place)


def _unfinished_beside(config: RunConfig, folder: Path) -> Iterator[Path]:
    """Checkpoints of runs of the same model and task that were not completed, the newest run first."""
    if not _DATED.search(str(folder)):
        return
    model = config.model.path and (config.model.path, os.path.abspath(os.path.expanduser(config.model.path)))
    for run in sorted(folder.parents[1].glob("*/*"), reverse=True):
        before = None if run == folder or is_completed(run) else _config_of(run)
        if before is None or before["task"]["target"] != config.task.target:
            continue
        if model is None or before["model"]["path"] in model:
            yield run / "checkpoints"


def _config_of(run: Path) -> Mapping[str, Any] | None:
    """What its newest readable checkpoint says; None when there is none."""
    for path in checkpoints(run / "checkpoints"):
        try:
            config: Mapping[str, Any] = load_progress(path)["config"]
        except (CheckpointError, KeyError):
            continue
        return config
    return None


def _with_defaults(before: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the config of an older version up to date: new names, and defaults for settings that it did not have."""
    before, _ = upgrade(before)
    return {
        name: {**default, **before.get(name, {})} if isinstance(default, dict) else before.get(name, default)
        for name, default in _as_json(RunConfig()).items()
    }


def _as_json(config: RunConfig) -> dict[str, Any]:
    """As it comes back from a checkpoint: tuples and integer keys are gone."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_mutable(key: str) -> bool:
    """Whether a resumed run may have another value there."""
    return any(key == mutable or key.startswith(f"{mutable}.") for mutable in _MUTABLE_KEYS)
