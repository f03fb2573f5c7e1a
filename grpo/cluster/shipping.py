"""Files of the driver's node that actors read elsewhere: the model folder, and that of the problems.

A node that has the very same files under the same path, on a file system that it shares or as the driver's own node,
reads them there. Any other gets a copy through the object store, once for all of its processes.
"""

# MERGED: Which code travels to the nodes of a cluster: this package, and what the user's config has had imported.

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo.config.schema import RunConfig
from grpo.errors import ConfigError
from grpo.models.loading import cache_folder, cached

_CHUNK_BYTES, _CHUNKS_AHEAD = 32 << 20, 4


@dataclass(frozen=True)
class File:
    """Its state as rsync looks at it: as long as size and time are the same, so is the content."""

    name: str  # within its folder; empty where the path is the file itself
    size: int
    changed_ns: int


@dataclass(frozen=True)
class Files:
    """A folder or a file of a node."""

    key: str  # of the config, which names it
    path: str
    files: tuple[File, ...]
    node: str

    def here(self) -> str:
        """A path on this node with the same content; copied first where that is missing. Blocks meanwhile."""
        if found_at(self.path) == self.files:
            return self.path
        state = hashlib.sha256(repr((self.path, self.files)).encode()).hexdigest()[:16]
        lock = cache_folder() / "copies" / f"{state}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as alone:  # the other processes of this node wait for the one that copies
            fcntl.flock(alone, fcntl.LOCK_EX)
            folder = cached(f"copies/{state}", self._copy_into)
        return str(folder / Path(self.path).name)

    def _copy_into(self, folder: Path) -> None:
        for file in self.files:
            target = folder / Path(self.path).name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            read = _read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, soft=False))
            chunk = partial(read.remote, self.key, self.path, file)
            with target.open("wb") as copy:
                coming: deque[ray.ObjectRef] = deque()
                for begin in range(0, file.size, _CHUNK_BYTES):
                    coming.append(chunk(begin, min(_CHUNK_BYTES, file.size - begin)))
                    if len(coming) == _CHUNKS_AHEAD:
                        copy.write(_arrived(coming.popleft()))
                while coming:
                    copy.write(_arrived(coming.popleft()))


@dataclass(frozen=True)
class CarriedConfig:
    """A config on its way to another node, with the files that it names."""

    config: RunConfig
    files: tuple[Files, ...]

    def here(self) -> RunConfig:
        """The config with paths of this node. Blocks while files are copied. ConfigError when they have changed."""
        config = self.config
        for files in self.files:
            group = files.key.partition(".")[0]
            config = replace(config, **{group: replace(getattr(config, group), path=files.here())})
        return config


def carried(config: RunConfig, node: str) -> CarriedConfig:
    """A config of this node, to be sent to others."""
    paths = {"model.path": config.model.path, "task.path": config.task.path}
    there = {key: path for key, path in paths.items() if path is not None and os.path.isabs(path)}
    return CarriedConfig(config, tuple(Files(key, path, found_at(path), node) for key, path in there.items()))


def found_at(path: str) -> tuple[File, ...]:
    """The files of a folder, or the one at the path; none where there is nothing."""
    top = Path(path)
    inside: Sequence[Path] = sorted(each for each in top.rglob("*") if each.is_file()) if top.is_dir() else [top]
    return tuple(_state(file, "" if file == top else str(file.relative_to(top))) for file in inside if file.is_file())


def _state(file: Path, name: str) -> File:
    status = file.stat()
    return File(name, status.st_size, status.st_mtime_ns)


@ray.remote(num_cpus=0)
def _read(key: str, path: str, file: File, begin: int, count: int) -> NDArray[np.uint8]:
    """A chunk, uint8 [bytes]. Runs on the node that has the file."""
    there = Path(path, file.name) if file.name else Path(path)
    if not there.is_file() or _state(there, file.name) != file:
        raise ConfigError(f"{there} was changed after the run had begun; start a new run", key=key)
    return np.fromfile(there, np.uint8, count=count, offset=begin)


def _arrived(chunk: ray.ObjectRef) -> memoryview:
    try:
        content: NDArray[np.uint8] = chunk.future().result()  # ray.get would warn: this actor has an event loop
    except RayTaskError as error:
        raise error.cause from error
    return content.data


_PACKAGE = Path(__file__).parents[1]
# Beside what a .gitignore leaves out; patterns as in one.
_EXCLUDED = ["__pycache__/", "*.pyc", ".git/", ".venv/", "/outputs/", "/multirun/"]


def runtime_env(empty: str) -> dict[str, Any]:
    """Has every node run this very code: Ray brings it there, once for each state that it is in.

    Installed libraries do not travel, except this package where it is one: it must be the same everywhere. Actors work
    in a copy of the `empty` folder: else Ray has them look for modules where the driver works, ahead of all others, and
    a node may have another version there. A job that was submitted has a folder already.
    """
    places = {_PACKAGE, *local_modules(sys.modules, _libraries())}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    folder = {} if "working_dir" in job else {"working_dir": empty}
    return {"py_modules": sorted(map(str, places)), "excludes": _EXCLUDED, **folder}


def local_modules(modules: Mapping[str, Any], libraries: Iterable[Path]) -> set[Path]:
    """Folders of packages and files of modules that lie in no library, as far as they are imported."""
    libraries, found = set(libraries), set()
    for name, module in list(modules.items()):
        if "." in name or name == "__main__":
            continue
        package = [Path(folder) for folder in getattr(module, "__path__", None) or []]
        file = getattr(module, "__file__", None) or ""
        for place in package or [Path(file)] * file.endswith(".py"):
            if not libraries & {place.resolve(), *place.resolve().parents}:
                found.add(place.absolute())
    return found


def _libraries() -> set[Path]:
    """Python's own, and every folder that pip has installed into."""
    standard = (Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    installed = (Path(folder) for folder in sys.path if any(Path(folder).glob("*.dist-info")))
    return {folder.resolve() for folder in (*standard, *installed)}
