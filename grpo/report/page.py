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

from grpo.errors import ReportError
from grpo.observe.run_dir import to_json
from grpo.report.data import Record, RunRecord, differing, figures, read_attempt, read_rollouts, read_run, runs_of
from grpo.report.timeline import read_timeline

_SCRIPTS = ("base.js", "curves.js", "compare.js", "groups.js", "lanes.js", "loop.js", "live.js", "report.js")
_MOST_POINTS = 4000  # of a curve


def write_report(folders: Sequence[Path], out: Path | None = None, *, from_s: float = 0.0) -> Path:
    """Write the page of one run, or of several; the timeline from `from_s` on. Raises ReportError.

    The folder of a sweep stands for its runs. Among several, one that never trained a step stands as failed.
    """
    folders = named_runs(folders)
    if len(folders) == 1:
        run = read_run(folders[0])
        return _write(one(run, timeline_of(run.folder, from_s)), out or run.folder / "report.html")
    return _write(several([read_attempt(folder) for folder in folders]), out or _common(folders) / "comparison.html")


def named_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant by folders of runs, or of sweeps. Raises ReportError when there are none."""
    if len(folders) > 1:
        folders = [folder for folder in folders if not folder.is_file()]  # a sweep's `*` names files too
    if not folders:
        raise ReportError("no folder of a run was named")
    return [run for folder in folders for run in runs_of(folder)]


def _write(data: Record, out: Path) -> Path:
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


def one(run: RunRecord, timeline: Record | None) -> Record:
    """Everything about one run."""
    notes = list(run.notes)
    rollouts = read_rollouts(run.folder, notes)
    return {"runs": [_of_run(run, name_of(run.folder), notes)], "rollouts": rollouts, "timeline": timeline}


def timeline_of(folder: Path, from_s: float) -> Record | None:
    return read_timeline(folder / "timeline.json", from_s=from_s)


def name_of(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def several(runs: Sequence[RunRecord]) -> Record:
    """The curves and figures of several runs, and the settings in which they differ."""
    runs = in_order(runs)
    settings, common = differing(runs), _common([run.folder for run in runs])
    names = [str(run.folder.resolve().relative_to(common)) for run in runs]
    labels = [name + _settings(settings, place) for place, name in enumerate(names)]
    return {
        "runs": [_of_run(run, label, list(run.notes)) for run, label in zip(runs, labels, strict=True)],
        "differing": settings,
        "title": name_of(common),
    }


def in_order(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Of a sweep over one number in its order, else as they come."""
    settings = differing(runs)
    values, *others = settings.values() or [[]]
    if others or not all(isinstance(value, (int, float)) for value in values):
        return list(runs)
    return [run for _, run in sorted(zip(values, runs, strict=False), key=lambda pair: pair[0])] or list(runs)


def _of_run(run: RunRecord, name: str, notes: list[str]) -> Record:
    every = max(1, math.ceil(len(run.steps) / _MOST_POINTS))
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


def _settings(settings: Mapping[str, Sequence[Any]], place: int) -> str:
    """Few enough to stand in a legend."""
    if len(settings) > 2:
        return ""
    return "".join(f" · {key.rpartition('.')[2]}={values[place]}" for key, values in settings.items())


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
