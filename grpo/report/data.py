"""What a run's folder says of the run, also of one that was killed half-way through a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grpo.types import NothingTrained, ReportError

Record = dict[str, Any]

_EXAMPLE = "outputs/2026-01-31/12-00-00"


@dataclass(frozen=True)
class Run:
    """The files of a run, parsed. `notes` says what was missing or broken."""

    folder: Path
    steps: list[Record]
    summary: Record
    config: Record  # flat: "trainer.lr" -> 0.0003
    config_text: str
    events: list[Record]  # deaths of processes and the like
    notes: list[str]

    @property
    def evaluations(self) -> list[Record]:
        """From the summary, or, of a run without one, from the lines of its steps."""
        if "evaluations" in self.summary:
            return list(self.summary["evaluations"])
        return [_under(step, "eval/") for step in self.steps if "eval/step" in step]

    @property
    def deaths(self) -> list[Record]:
        """Each with when its replacement served and when the next step was trained, in seconds after it, if ever."""
        died = [event | {"back_s": None} for event in self.events if event.get("event") == "died"]
        for event in self.events:
            if event.get("event") == "back":  # of its last death: a place is taken by one process after another
                of_it = [death for death in died if death["actor"] == event["actor"] and death["at_s"] <= event["at_s"]]
                if of_it:
                    of_it[-1]["back_s"] = event["after_s"]
        return [death | self._next_step(death["at_s"]) for death in died]

    @property
    def resumed_at(self) -> list[int]:
        return [event["step"] for event in self.events if event.get("event") == "resumed"]

    def _next_step(self, at_s: float) -> Record:
        """The step that was under way, and how long it still took; the last one when none came after."""
        after = next((step for step in self.steps if (step.get("wall_s") or 0.0) > at_s), None)
        if after is None:
            return {"step": self.steps[-1]["step"], "next_step_s": None}
        return {"step": after["step"], "next_step_s": after["wall_s"] - at_s}


def read_run(folder: Path) -> Run:
    """Raises ReportError when this is no run's folder, and NothingTrained when it is one, but of no step yet."""
    check_folder(folder)
    notes: list[str] = []
    steps = [line for line in read_jsonl(folder / "metrics.jsonl", notes) if "step" in line]
    if not steps:
        raise NothingTrained(f"{folder}: no step was trained yet; --serve waits for the first")
    text = _text(folder / "config.yaml")
    events = [event for event in read_jsonl(folder / "events.jsonl", notes) if "at_s" in event]
    return Run(folder, steps, read_summary(folder, notes), _config(text, notes), text, events, notes)


def check_folder(folder: Path) -> None:
    """Raises ReportError when this is no run's folder."""
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "no such folder"
        raise ReportError(f"{folder}: {wrong}; name the folder of a run, as in {_EXAMPLE}")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", ".hydra")):
        raise ReportError(f"{folder} holds no metrics.jsonl: it is no run's folder; name one, as in {_EXAMPLE}")


def read_rollouts(folder: Path, notes: list[str], most: int = 3000, most_bytes: int = 12_000_000) -> list[Record]:
    """The sampled groups; where there are too many for a page, evenly chosen ones, the last among them."""
    groups = read_jsonl(folder / "rollouts.jsonl", notes)
    size = sum(len(json.dumps(group)) for group in groups[:: max(1, len(groups) // 50)]) * max(1, len(groups) // 50)
    keep = min(most, len(groups), max(1, int(len(groups) * most_bytes / max(1, size))))
    if keep == len(groups):
        return groups
    notes.append(f"The page holds {keep:,} of {len(groups):,} sampled groups, evenly spread over the run.")
    return [groups[len(groups) - 1 - place * len(groups) // keep] for place in range(keep)][::-1]


def read_jsonl(file: Path, notes: list[str]) -> list[Record]:
    """The records of a file, none if it is not there. A line that can't be read is passed over and noted."""
    records, broken = [], 0
    for line in _text(file).split("\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record, broken = None, broken + 1
        if isinstance(record, dict):
            records.append(record)
    if broken:
        notes.append(f"{file.name}: {broken} broken {'line was' if broken == 1 else 'lines were'} passed over.")
    return records


def figures(run: Run) -> Record:
    """What the header and the table of several runs show. Where there is no summary, from the steps."""
    rewards = [step["reward/mean"] for step in run.steps if step.get("reward/mean") is not None]
    tenth, seconds = max(1, len(rewards) // 10), total(run, "time/step_s")
    evaluations = [each["reward_mean"] for each in run.evaluations if each.get("reward_mean") is not None]
    found: Record = {
        "status": "no summary: it still runs, or was killed",
        "steps": run.steps[-1]["step"],
        "wall_s": run.steps[-1].get("wall_s"),
        "reward_first": fmean(rewards[:tenth]) if rewards else None,
        "reward_last": fmean(rewards[-tenth:]) if rewards else None,
        "eval_first": evaluations[0] if evaluations else None,
        "eval_last": evaluations[-1] if len(evaluations) > 1 else None,
        "trainer_wait_fraction": total(run, "time/trainer_wait_s") / seconds if seconds else None,
        "generator_busy_fraction": _weighted(run, "generator/busy_fraction"),
        "restarts": {"": run.steps[-1].get("recovery/restarts", 0)},
        "error": None,
    }
    found |= {name: run.summary[name] for name in found if name in run.summary}
    groups = run.config.get("trainer.groups_per_step")
    return found | {
        "restarts": sum(found["restarts"].values()),
        "groups_per_s": len(run.steps) * groups / seconds if groups and seconds else None,
        "tokens_per_s": _weighted(run, "generator/tokens_per_s"),
    }


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ, but for where they came from."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    passed_over = ("resume", "checkpoint.dir")
    return [k for k in keys if k not in passed_over and len({repr(run.config.get(k)) for run in runs}) > 1]


def total(run: Run, name: str) -> float:
    return float(sum(step.get(name) or 0.0 for step in run.steps))


def _weighted(run: Run, name: str) -> float | None:
    """A mean over time, not over steps."""
    pairs = [(step[name], step.get("time/step_s") or 0.0) for step in run.steps if step.get(name) is not None]
    seconds = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / seconds if seconds else None


def _under(record: Mapping[str, Any], prefix: str) -> Record:
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def read_summary(folder: Path, notes: list[str]) -> Record:
    if not (text := _text(folder / "summary.json")):
        return {}
    try:
        return dict(json.loads(text))
    except ValueError:
        notes.append("summary.json can't be read.")
        return {}


def _config(text: str, notes: list[str]) -> Record:
    try:
        return _flat(OmegaConf.to_container(OmegaConf.create(text))) if text else {}
    except (OmegaConfBaseException, YAMLError):
        notes.append("config.yaml can't be read.")
        return {}


def _flat(config: Any, prefix: str = "") -> Record:
    if not isinstance(config, dict):
        return {prefix: config}
    inner = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in inner for key, value in part.items()}
