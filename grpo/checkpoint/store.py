"""Checkpoint folders, written completely or not at all.

    checkpoints/step_000100/
        model/                              an ordinary Hugging Face folder; for adapters, in peft's format
        trainer.safetensors, trainer.json   trained parameters in float32, by rank; version and counters
        groups.safetensors, groups.json     finished groups that wait to be trained on
        progress.json                       the driver's state
        manifest.json                       size and checksum of every other file; written last

A folder whose name begins with a dot is unfinished, or is being replaced. The manifest tells an intact checkpoint from
a damaged one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from grpo.checkpoint import group_file, trainer_state
from grpo.checkpoint.trainer_state import Parameters, TrainerState
from grpo.errors import CheckpointError
from grpo.types import Group
from grpo.weights.flat_buffer import file_checksum

MODEL, MANIFEST = "model", "manifest.json"
_PROGRESS = "progress.json"
_REQUIRED = (trainer_state.COUNTERS, group_file.TENSORS, group_file.RECORDS, _PROGRESS)
_WHOLE, _ADAPTERS = f"{MODEL}/config.json", f"{MODEL}/adapter_config.json"
_NAME = re.compile(r"step_\d{6,}")
_UNFINISHED, _REPLACED = "unfinished", "replaced"
ExportModel = Callable[[Mapping[str, Tensor], Path], None]
"""Writes a folder with the given parameters that Hugging Face's libraries load."""


def save_checkpoint(
    folder: Path,
    step: int,
    states: Sequence[TrainerState],
    groups: Iterable[tuple[int, Group]],
    progress: Mapping[str, Any],
    export_model: ExportModel,
) -> Path:
    """Write `step_<step>` under `folder` and return its path; replaces a checkpoint of the same step.

    `states` are the states of all ranks; `groups` are pairs (ticket serial, group with its values); `progress` is
    JSON-able. Removes unfinished folders of earlier crashes. Raises CheckpointError if it can't be written; other
    checkpoints are then untouched.

    Example:
        path = save_checkpoint(run / "checkpoints", 100, [learner.state()], [], {"step": 100}, export_model)
        verify(path)
        states = load_trainer(path)
    """
    final = folder / f"step_{step:06d}"
    unfinished = _hidden(final, _UNFINISHED)
    with _all_or_nothing(folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        _clean_up(folder)
        unfinished.mkdir()
        export_model(Parameters(states), unfinished / MODEL)
        trainer_state.write_states(unfinished, states)
        group_file.write_groups(unfinished, groups)
        (unfinished / _PROGRESS).write_text(json.dumps(dict(progress), ensure_ascii=False), encoding="utf-8")
        write_manifest(unfinished)

        # The old checkpoint of this step is removed last: after a crash in between, `_restore_replaced` finds it.
        replaced = _hidden(final, _REPLACED)
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        _fsync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def load_trainer(path: Path) -> list[TrainerState]:
    """Return the learner's state, one per rank that it had. Raises CheckpointError."""
    with _reading(path):
        return trainer_state.read_states(path)


def load_groups(path: Path) -> list[tuple[int, Group]]:
    """Return the (ticket serial, group) pairs; their problems have no metadata. Raises CheckpointError."""
    with _reading(path):
        return group_file.read_groups(path)


def load_progress(path: Path) -> dict[str, Any]:
    """Return the driver's state. Raises CheckpointError."""
    with _reading(path):
        return dict(json.loads((path / _PROGRESS).read_text(encoding="utf-8")))


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, if one is missing, truncated or damaged."""
    check_manifest(path, (*_REQUIRED, _ADAPTERS if (path / _ADAPTERS).is_file() else _WHOLE))


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, the last written first.

    Order is by time, not by step: a run that was resumed from an older checkpoint writes newer ones of lower steps.
    """
    paths = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (saved_at(path), int(path.name.removeprefix("step_"))), reverse=True)


def latest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, or None, and a warning for each newer one that is damaged."""
    warnings = []
    _restore_replaced(folder)
    for path in checkpoints(folder):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.append(f"{error}; trying the checkpoint before it")
        else:
            return path, warnings
    return None, warnings


def find_checkpoint(source: Path) -> tuple[Path, list[str]]:
    """Return `source` itself if it is a checkpoint, else the newest intact one of a run; and warnings for newer ones.

    Raises CheckpointError, naming the fix, if there is none.
    """
    if (source / MODEL).is_dir():
        verify(source)
        return source, []
    folder = source if checkpoints(source) else source / "checkpoints"
    newest, warnings = latest_good(folder)
    if newest is None:
        reasons = "; ".join(warnings) or f"no step_* in {folder}"
        raise CheckpointError(f"no intact checkpoint: {reasons}; name a checkpoint, or a run that has one")
    return newest, warnings


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints that were written last. Raises OSError."""
    for path in checkpoints(folder)[keep:]:
        hidden = _hidden(path, _UNFINISHED)
        path.rename(hidden)  # a complete name never belongs to a half-removed checkpoint
        shutil.rmtree(hidden)


def write_manifest(folder: Path) -> None:
    """List every file of `folder` in its manifest, and flush all of it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _fsync(path)
    entries = {str(path.relative_to(folder)): _entry(path) for path in files}
    content = {"format": 1, "saved_at": time.time(), "files": entries}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    _fsync(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _fsync(path)


def check_manifest(folder: Path, required: Iterable[str]) -> None:
    """Raise CheckpointError, naming the file, if a required or listed file is missing or differs from the manifest."""
    try:
        files = dict(_read_manifest(folder)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is missing or broken: {error}") from error
    for name in sorted({*required} - files.keys()):
        raise CheckpointError(f"{folder / MANIFEST} does not list {name}")
    for name, expected in files.items():
        path = folder / name
        try:
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            if _entry(path) != expected:
                raise CheckpointError(f"{path} is damaged: wrong checksum")
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or can't be read: {error}") from error


def saved_at(folder: Path) -> float:
    """Return when the folder was written, in seconds since 1970; without a readable manifest, its mtime."""
    try:
        return float(_read_manifest(folder)["saved_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime


def total_bytes(folder: Path) -> int:
    """Return the size of all files that the manifest lists."""
    return sum(entry["bytes"] for entry in _read_manifest(folder)["files"].values())


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}


def _read_manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _restore_replaced(folder: Path) -> None:
    """Rename back a checkpoint that a crash left hidden while it was being replaced."""
    for replaced in folder.glob(f".step_*.{_REPLACED}"):
        final = folder / replaced.name.removeprefix(".").removesuffix(f".{_REPLACED}")
        if not final.exists():
            replaced.rename(final)


def _clean_up(folder: Path) -> None:
    _restore_replaced(folder)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _all_or_nothing(folder: Path, step: int) -> Iterator[None]:
    """Clean up after any error of the block; turn errors of the disk into CheckpointError."""
    try:
        yield
    except BaseException as error:
        _clean_up(folder)
        number = error.errno if isinstance(error, OSError) else None
        # Libraries written in Rust report the system's error as text.
        if number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
            raise CheckpointError(
                f"no space left in {folder} for the checkpoint of step {step}; free some or set checkpoint.dir"
            ) from error
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"the checkpoint of step {step} can't be written: {error}") from error
        raise


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} can't be read: {type(error).__name__}: {error}") from error
