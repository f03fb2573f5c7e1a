"""What tells a whole folder from a broken one: the size and checksum of every file in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo.checksum import file_checksum
from grpo.types import CheckpointError

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
