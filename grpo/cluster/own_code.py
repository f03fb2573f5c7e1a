"""Which code travels to the nodes of a cluster: this package, and what the user's config has had imported."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]

# Beside what a .gitignore leaves out; patterns as in one.
_EXCLUDED = ["__pycache__/", "*.pyc", ".git/", ".venv/", "/outputs/", "/multirun/"]


def runtime_env(empty: str) -> dict[str, Any]:
    """Has every node run this very code: Ray brings it there, once for each state that it is in.

    Installed libraries do not travel, except this package where it is one: it must be the same everywhere. Actors work
    in a copy of the `empty` folder: else Ray has them look for modules where the driver works, ahead of all others, and
    a node may have another version there. A job that was submitted has a folder already.
    """
    places = {_PACKAGE, *own_places(sys.modules, _libraries())}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    folder = {} if "working_dir" in job else {"working_dir": empty}
    return {"py_modules": sorted(map(str, places)), "excludes": _EXCLUDED, **folder}


def own_places(modules: Mapping[str, Any], libraries: Iterable[Path]) -> set[Path]:
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
