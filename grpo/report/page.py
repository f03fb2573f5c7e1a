"""Write the report as one self-contained HTML file: styles, scripts, Plotly and the data of the runs are inlined."""

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
    """Write the page of one run, with its timeline from `from_s` on, or of several. Raises ReportError.

    The folder of a sweep stands for its runs. Among several, a run without a step is shown as failed.
    """
    folders = named_runs(folders)
    if len(folders) == 1:
        run = read_run(folders[0])
        data = run_data(run, read_timeline(run.folder / "timeline.json", from_s=from_s))
        return _write(data, out or run.folder / "report.html")
    data = comparison_data([read_attempt(folder) for folder in folders])
    return _write(data, out or _common(folders) / "comparison.html")


def named_runs(folders: Sequence[Path]) -> list[Path]:
    """Expand the folders of sweeps to their runs. Raises ReportError when no run is named."""
    if len(folders) > 1:
        folders = [folder for folder in folders if not folder.is_file()]  # a shell's `sweep/*` names files too
    if not folders:
        raise ReportError("no run folder given")
    return [run for folder in folders for run in runs_of(folder)]


def _write(data: Record, out: Path) -> Path:
    try:
        out.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"can't write {out}: {error.strerror}") from error
    return out


def page(data: Mapping[str, Any]) -> str:
    """Fill the placeholders of the template, in one pass: data that looks like a placeholder is left alone.

    A page with `live` data asks its server for updates; any other page makes no requests.
    """
    parts = {
        "connect": "'self'" if data.get("live") else "'none'",
        "style": _asset("report.css"),
        "plotly": _inline((files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")),
        "data": to_json(data).replace("<", "\\u003c"),  # so that no text can end the script element
        "script": _inline("\n".join(_asset(name) for name in _SCRIPTS)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda placeholder: parts[placeholder[1]], _asset("report.html"))


def run_data(run: RunRecord, timeline: Record | None) -> Record:
    """Return the page's data for one run."""
    notes = list(run.notes)
    rollouts = read_rollouts(run.folder, notes)
    return {"runs": [_run_entry(run, name_of(run.folder), notes)], "rollouts": rollouts, "timeline": timeline}


def name_of(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def comparison_data(runs: Sequence[RunRecord]) -> Record:
    """Return the page's data for several runs: curves, figures and the settings in which they differ."""
    runs = in_order(runs)
    settings, common = differing(runs), _common([run.folder for run in runs])
    names = [str(run.folder.resolve().relative_to(common)) for run in runs]
    labels = [name + _settings(settings, place) for place, name in enumerate(names)]
    return {
        "runs": [_run_entry(run, label, list(run.notes)) for run, label in zip(runs, labels, strict=True)],
        "differing": settings,
        "title": name_of(common),
    }


def in_order(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Sort runs that differ in one number by that number; leave others in their order."""
    settings = differing(runs)
    values, *others = settings.values() or [[]]
    if others or not all(isinstance(value, (int, float)) for value in values):
        return list(runs)
    return [run for _, run in sorted(zip(values, runs, strict=False), key=lambda pair: pair[0])] or list(runs)


def _run_entry(run: RunRecord, name: str, notes: list[str]) -> Record:
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
    """Return each metric over the steps; for long runs, means of `every` steps."""
    names = dict.fromkeys(name for step in steps for name in step if not name.startswith("eval/"))
    blocks = [steps[place : place + every] for place in range(0, len(steps), every)]
    thinned = {name: [_mean(block, name) for block in blocks] for name in names}
    return thinned | {"step": [block[-1]["step"] for block in blocks]}


def _mean(block: Sequence[Record], name: str) -> float | None:
    values = [step[name] for step in block if isinstance(step.get(name), (int, float))]
    return float(f"{fmean(values):.6g}") if values else None


def _settings(settings: Mapping[str, Sequence[Any]], place: int) -> str:
    """Format the differing settings of a run for a legend; empty when there are more than two."""
    if len(settings) > 2:
        return ""
    return "".join(f" · {key.rpartition('.')[2]}={values[place]}" for key, values in settings.items())


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _asset(name: str) -> str:
    return (files("grpo.report") / "page" / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Escape what would end a script element."""
    return re.sub(r"<(?=/script|!--)", r"\\x3C", script, flags=re.IGNORECASE)
