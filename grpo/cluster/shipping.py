"""Ship the driver's files to other nodes: the model folder, the problems, and the code.

A node that has the same files under the same path reads its own: the driver's node, or one with a shared file system.
Any other node gets a copy of models and problems through the object store, once for all of its processes. Ray itself
ships the code: this package, and the modules that the user's config has had imported.
"""

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
_PACKAGE = Path(__file__).parents[1]
_EXCLUDED = ["__pycache__/", "*.pyc", ".git/", ".venv/", "/outputs/", "/multirun/"]  # besides a .gitignore's patterns


@dataclass(frozen=True)
class FileState:
    """Name, size and time of a file. As for rsync, the content is the same while size and time are."""

    name: str  # within its folder; empty if the shipped path is the file itself
    size: int
    changed_ns: int


@dataclass(frozen=True)
class ShippedFiles:
    """A folder or a file of one node, to be read on other nodes."""

    key: str  # the config key that names the path
    path: str
    files: tuple[FileState, ...]
    node: str

    def localize(self) -> str:
        """Return a path on this node with the same content, after copying it if needed. Blocks meanwhile."""
        if list_files(self.path) == self.files:
            return self.path
        state = hashlib.sha256(repr((self.path, self.files)).encode()).hexdigest()[:16]
        lock = cache_folder() / "copies" / f"{state}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:  # the other processes of this node wait for the one that copies
            fcntl.flock(handle, fcntl.LOCK_EX)
            folder = cached(f"copies/{state}", self._copy_into)
        return str(folder / Path(self.path).name)

    def _copy_into(self, folder: Path) -> None:
        for file in self.files:
            target = folder / Path(self.path).name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            read = _read_chunk.options(scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, soft=False))
            request = partial(read.remote, self.key, self.path, file)
            with target.open("wb") as copy:
                chunks: deque[ray.ObjectRef] = deque()
                for begin in range(0, file.size, _CHUNK_BYTES):
                    chunks.append(request(begin, min(_CHUNK_BYTES, file.size - begin)))
                    if len(chunks) == _CHUNKS_AHEAD:
                        copy.write(_content(chunks.popleft()))
                while chunks:
                    copy.write(_content(chunks.popleft()))


@dataclass(frozen=True)
class ShippedConfig:
    """A config that is sent to another node, with the files that it names."""

    config: RunConfig
    files: tuple[ShippedFiles, ...]

    def localize(self) -> RunConfig:
        """Return the config with paths of this node. Blocks while files are copied.

        Raises ConfigError when a file has changed since the run began.
        """
        config = self.config
        for files in self.files:
            group = files.key.partition(".")[0]
            config = replace(config, **{group: replace(getattr(config, group), path=files.localize())})
        return config


def ship_config(config: RunConfig, node: str) -> ShippedConfig:
    """Prepare a config of this node, whose id is `node`, for other nodes."""
    paths = {"model.path": config.model.path, "task.path": config.task.path}
    local = {key: path for key, path in paths.items() if path is not None and os.path.isabs(path)}
    return ShippedConfig(config, tuple(ShippedFiles(key, path, list_files(path), node) for key, path in local.items()))


def list_files(path: str) -> tuple[FileState, ...]:
    """Return the files of a folder, or the one at the path; none if there is nothing."""
    top = Path(path)
    inside: Sequence[Path] = sorted(each for each in top.rglob("*") if each.is_file()) if top.is_dir() else [top]
    return tuple(_state(file, "" if file == top else str(file.relative_to(top))) for file in inside if file.is_file())


def _state(file: Path, name: str) -> FileState:
    status = file.stat()
    return FileState(name, status.st_size, status.st_mtime_ns)


@ray.remote(num_cpus=0)
def _read_chunk(key: str, path: str, file: FileState, begin: int, count: int) -> NDArray[np.uint8]:
    """Return a chunk of a file, uint8 [bytes]. Runs on the node that has the file."""
    source = Path(path, file.name) if file.name else Path(path)
    if not source.is_file() or _state(source, file.name) != file:
        raise ConfigError(f"{source} has changed since the run began. Start a new run", key=key)
    return np.fromfile(source, np.uint8, count=count, offset=begin)


def _content(chunk: ray.ObjectRef) -> memoryview:
    try:
        content: NDArray[np.uint8] = chunk.future().result()  # ray.get would warn: this actor has an event loop
    except RayTaskError as error:
        raise error.cause from error
    return content.data


def runtime_env(empty: str) -> dict[str, Any]:
    """Return a Ray runtime environment in which every node runs the driver's code; Ray ships it once per version.

    Installed libraries are not shipped, except this package if it is one: they must be the same everywhere. Actors work
    in a copy of the `empty` folder. Otherwise Ray has them look for modules where the driver works, before all other
    places, and a node may have another version there. A submitted job has a working folder already.
    """
    modules = {_PACKAGE, *local_modules(sys.modules, _libraries())}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    folder = {} if "working_dir" in job else {"working_dir": empty}
    return {"py_modules": sorted(map(str, modules)), "excludes": _EXCLUDED, **folder}


def local_modules(modules: Mapping[str, Any], libraries: Iterable[Path]) -> set[Path]:
    """Return the package folders and module files, of imported modules, that lie in no library."""
    libraries, local = set(libraries), set()
    for name, module in list(modules.items()):
        if "." in name or name == "__main__":
            continue
        package = [Path(folder) for folder in getattr(module, "__path__", None) or []]
        file = getattr(module, "__file__", None) or ""
        for place in package or [Path(file)] * file.endswith(".py"):
            if not libraries & {place.resolve(), *place.resolve().parents}:
                local.add(place.absolute())
    return local


def _libraries() -> set[Path]:
    """Return the folders of Python's own library, and every folder that pip has installed into."""
    standard = (Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    installed = (Path(folder) for folder in sys.path if any(Path(folder).glob("*.dist-info")))
    return {folder.resolve() for folder in (*standard, *installed)}
