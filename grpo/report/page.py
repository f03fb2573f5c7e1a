"""One HTML file that needs nothing else: styles, scripts, Plotly and the data of the runs stand in it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.observe.run_dir import to_json
from grpo.report.data import Record, Run, differing, figures, read_rollouts, read_run
from grpo.report.timeline import read_timeline
from grpo.types import ReportError

_SCRIPTS = ("base.js", "curves.js", "compare.js", "groups.js", "lanes.js", "loop.js", "live.js", "report.js")
_MOST_POINTS = 4000  # of a curve


def write_report(folders: Sequence[Path], out: Path | None = None, *, from_s: float = 0.0) -> Path:
    """Write the page of one run, or of several; the timeline from `from_s` on. Raises ReportError."""
    if len(folders) > 1:
        folders = [folder for folder in folders if not folder.is_file()]  # a sweep's `*` names files too
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ReportError("no folder of a run was named")
    data = one(runs[0], timeline_of(runs[0].folder, from_s)) if len(runs) == 1 else several(runs)
    out = out or (folders[0] / "report.html" if len(runs) == 1 else _common(folders) / "comparison.html")
    try:
        out.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"can't write {out}: {error.strerror}") from error
    return out


def page(data: Mapping[str, Any]) -> str:
    """Places of the template are filled in one pass: what the data holds is never taken for a place.

    Data that is `live` comes from a server, which the page asks for more; any other page asks nobody for anything.
    """
    parts = {
        "connect": "'self'" if data.get("live") else "'none'",
        "style": _asset("report.css"),
        "plotly": _inline(_plotly()),
        "data": _json(data),
        "script": _inline("\n".join(_asset(name) for name in _SCRIPTS)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))


def one(run: Run, timeline: Record | None) -> Record:
    """Everything about one run."""
    notes = list(run.notes)
    rollouts = read_rollouts(run.folder, notes)
    return {"runs": [_of_run(run, name_of(run.folder), notes)], "rollouts": rollouts, "timeline": timeline}


def timeline_of(folder: Path, from_s: float) -> Record | None:
    return read_timeline(folder / "timeline.json", from_s=from_s)


def name_of(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def several(runs: Sequence[Run]) -> Record:
    """The curves and figures of several runs, and the settings in which they differ."""
    keys, common = differing(runs), _common([run.folder for run in runs])
    if len(keys) == 1 and all(isinstance(run.config.get(keys[0]), (int, float)) for run in runs):
        runs = sorted(runs, key=lambda run: float(run.config[keys[0]]))  # a sweep; a shell sorts 16 before 4
    named = [(run, str(run.folder.resolve().relative_to(common))) for run in runs]
    labelled = [(run, name + _settings(run, keys if len(keys) <= 2 else [])) for run, name in named]
    return {
        "runs": [_of_run(run, label, list(run.notes)) for run, label in labelled],
        "differing": {key: [run.config.get(key) for run in runs] for key in keys},
    }


def _of_run(run: Run, name: str, notes: list[str]) -> Record:
    every = math.ceil(len(run.steps) / _MOST_POINTS)
    if every > 1:
        notes.append(f"Each point of the curves is the mean of {every} steps.")
    return {
        "name": name,
        "figures": figures(run),
        "evaluations": run.evaluations,
        "deaths": run.deaths,
        "resumed_at": run.resumed_at,
        "columns": columns(run.steps, every),
        "config": run.config_text,
        "notes": notes,
    }


def columns(steps: Sequence[Record], every: int = 1) -> dict[str, list[float | None]]:
    """Each metric over the steps; means of `every` steps where there are too many for a plot."""
    names = dict.fromkeys(name for step in steps for name in step if not name.startswith("eval/"))
    blocks = [steps[place : place + every] for place in range(0, len(steps), every)]
    thinned = {name: [_mean(block, name) for block in blocks] for name in names}
    return thinned | {"step": [block[-1]["step"] for block in blocks]}


def _mean(block: Sequence[Record], name: str) -> float | None:
    values = [step[name] for step in block if isinstance(step.get(name), (int, float))]
    return float(f"{fmean(values):.6g}") if values else None


def _settings(run: Run, keys: Sequence[str]) -> str:
    return "".join(f" · {key.rpartition('.')[2]}={run.config.get(key)}" for key in keys)


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _asset(name: str) -> str:
    return (files("grpo.report") / "page" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """What may stand in a script element."""
    return re.sub(r"<(?=/script|!--)", r"\\x3C", script, flags=re.IGNORECASE)


def _json(data: Mapping[str, Any]) -> str:
    """JSON in a script element: no sign in it can end the element."""
    return to_json(data).replace("<", "\\u003c")
