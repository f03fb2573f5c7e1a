"""Checkpoints: folders that a run goes on from, written whole or not at all.

    checkpoints/step_000100/
        model/                              an ordinary Hugging Face folder; of adapters, one that peft loads
        trainer.safetensors, trainer.json   what is trained, in float32, by rank; version and counters
        groups.safetensors, groups.json     finished groups that wait to be trained on
        progress.json                       the driver's own
        manifest.json                       size and checksum of every other file; written last

A folder whose name begins with a dot is one that was not finished, or one that is being replaced.
"""

# MERGED: What tells a whole folder from a broken one: the size and checksum of every file in it.

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

MODEL = "model"
_PROGRESS = "progress.json"
_PARTS = (trainer_state.COUNTERS, group_file.TENSORS, group_file.RECORDS, _PROGRESS)
_WHOLE, _ADAPTERS = f"{MODEL}/config.json", f"{MODEL}/adapter_config.json"
_NAME = re.compile(r"step_\d{6,}")
_UNFINISHED, _REPLACED = "unfinished", "replaced"
ExportModel = Callable[[Mapping[str, Tensor], Path], None]
"""Writes a folder that holds the given parameters, and that Hugging Face's libraries load."""


def save_checkpoint(
    folder: Path,
    step: int,
    states: Sequence[TrainerState],
    groups: Iterable[tuple[int, Group]],
    progress: Mapping[str, Any],
    export_model: ExportModel,
) -> Path:
    """Write `step_<step>` under `folder` and return its path; one of the same step is replaced.

    `states` are those of all ranks; `groups` are pairs (ticket serial, group with its values); `progress` is JSON-able.
    Removes what an earlier crash left unfinished. Raises CheckpointError, with other checkpoints untouched, when it
    can't be written.
    """
    final, unfinished = folder / f"step_{step:06d}", folder / f".step_{step:06d}.{_UNFINISHED}"
    with _all_or_nothing(folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        unfinished.mkdir()
        export_model(Parameters(states), unfinished / MODEL)
        trainer_state.write_states(unfinished, states)
        group_file.write_groups(unfinished, groups)
        (unfinished / _PROGRESS).write_text(json.dumps(dict(progress), ensure_ascii=False), encoding="utf-8")
        write_manifest(unfinished)
        _publish(unfinished, final)
    return final


def load_trainer(path: Path) -> list[TrainerState]:
    """The learner's state of a checkpoint, in as many parts as it had ranks. Raises CheckpointError."""
    with _reading(path):
        return trainer_state.read_states(path)


def load_groups(path: Path) -> list[tuple[int, Group]]:
    """The (ticket serial, group) pairs of a checkpoint; problems are without metadata. Raises CheckpointError."""
    with _reading(path):
        return group_file.read_groups(path)


def load_progress(path: Path) -> dict[str, Any]:
    """What the driver gave to be kept. Raises CheckpointError."""
    with _reading(path):
        return dict(json.loads((path / _PROGRESS).read_text(encoding="utf-8")))


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, when one is missing, short, or not what was written."""
    check_manifest(path, (*_PARTS, _ADAPTERS if (path / _ADAPTERS).is_file() else _WHOLE))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the last one written first; unfinished ones are left out.

    A run that goes on from an older checkpoint writes newer ones of lower steps, and they are what counts.
    """
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (saved_at(path), int(path.name.removeprefix("step_"))), reverse=True)


def latest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, or None; and a warning for each newer one that is not."""
    warnings = []
    _put_back(folder)
    for path in checkpoints(folder):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.append(f"{error}; trying the checkpoint before it")
        else:
            return path, warnings
    return None, warnings


def find_checkpoint(source: Path) -> tuple[Path, list[str]]:
    """A checkpoint itself, or the newest whole one of a run; and what is wrong with newer ones.

    Raises CheckpointError, naming the fix, when there is none.
    """
    if (source / MODEL).is_dir():
        verify(source)
        return source, []
    folder = source if checkpoints(source) else source / "checkpoints"
    newest, warnings = latest_good(folder)
    if newest is None:
        found = "; ".join(warnings) or f"no step_* in {folder}"
        raise CheckpointError(f"no whole checkpoint: {found}; name a checkpoint, or the run that has one")
    return newest, warnings


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints that were written last. Raises OSError."""
    for path in checkpoints(folder)[keep:]:
        aside = _aside(path, _UNFINISHED)
        path.rename(aside)  # at no time is there half a checkpoint under a complete name
        shutil.rmtree(aside)


def _publish(unfinished: Path, final: Path) -> None:
    replaced = _aside(final, _REPLACED)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """A crash while a checkpoint was replaced may have left the old one under its other name."""
    for replaced in folder.glob(f".step_*.{_REPLACED}"):
        final = folder / replaced.name.removeprefix(".").removesuffix(f".{_REPLACED}")
        if not final.exists():
            replaced.rename(final)


def _tidy(folder: Path) -> None:
    _put_back(folder)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _aside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


@contextmanager
def _all_or_nothing(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _tidy(folder)
        if _disk_full(error):
            raise CheckpointError(
                f"no space left in {folder} for the checkpoint of step {step}: free some or set checkpoint.dir"
            ) from error
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"the checkpoint of step {step} can't be written: {error}") from error
        raise


def _disk_full(error: BaseException) -> bool:
    """Libraries written in Rust give the system's error as text."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} can't be read: {type(error).__name__}: {error}") from error


MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """List every file of `folder`, and have all of it on the disk before this returns."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    content = {"format": 1, "saved_at": time.time(), "files": {str(p.relative_to(folder)): _entry(p) for p in files}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)


def check_manifest(folder: Path, parts: Iterable[str]) -> None:
    """Raise CheckpointError, naming the file, when one of `parts` or of the manifest is missing or not as written."""
    try:
        files = dict(_read(folder)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is missing or broken: {error}") from error
    for name in sorted({*parts} - files.keys()):
        raise CheckpointError(f"{folder / MANIFEST} does not list {name}")
    for name, expected in files.items():
        path = folder / name
        try:
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            if _entry(path) != expected:
                raise CheckpointError(f"{path} is not what was written: its checksum is another")
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or can't be read: {error}") from error


def saved_at(folder: Path) -> float:
    """When the folder was written, in seconds since 1970; where the manifest is broken, as the file system says."""
    try:
        return float(_read(folder)["saved_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime


def total_bytes(folder: Path) -> int:
    """Of all files that the manifest lists."""
    return sum(entry["bytes"] for entry in _read(folder)["files"].values())


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}


def _read(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
