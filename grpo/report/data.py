"""Read a run's folder, also while the run is writing to it, or after it was killed half-way through a line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grpo.errors import NothingTrained, ReportError
from grpo.observe.renamed_metrics import with_new_names

Record = dict[str, Any]
_EXAMPLE = "outputs/2026-01-31/12-00-00"


@dataclass(frozen=True)
class RunRecord:
    """The parsed files of a run. `notes` lists what was missing or broken."""

    folder: Path
    steps: list[Record]
    summary: Record
    config: Record  # flat: "trainer.lr" -> 0.0003
    config_text: str
    overrides: Record  # from the command line: "trainer.lr" -> 0.0003, "loss" -> "dapo"
    events: list[Record]  # lines of events.jsonl
    notes: list[str]

    @property
    def evaluations(self) -> list[Record]:
        """The evaluations in the summary; without a summary, those in the lines of the steps."""
        if "evaluations" in self.summary:
            return list(self.summary["evaluations"])
        evaluated = [step for step in self.steps if "eval/step" in step]
        return [{name[5:]: step[name] for name in step if name.startswith("eval/")} for step in evaluated]

    @property
    def deaths(self) -> list[Record]:
        """Deaths of processes, with the seconds until the replacement served and until the next step, if any."""
        died = [event | {"back_s": None} for event in self.events if event.get("event") == "died"]
        for event in self.events:
            if event.get("event") == "back":  # after the latest of possibly several deaths of this actor
                own = [death for death in died if death["actor"] == event["actor"] and death["at_s"] <= event["at_s"]]
                if own:
                    own[-1]["back_s"] = event["after_s"]
        return [death | self._next_step(death["at_s"]) for death in died]

    @property
    def resumed_at(self) -> list[int]:
        return [event["step"] for event in self.events if event.get("event") == "resumed"]

    def _next_step(self, at_s: float) -> Record:
        """Return the step in progress at a time and the seconds until its end; the last step when none followed."""
        after = next((step for step in self.steps if (step.get("wall_s") or 0.0) > at_s), None)
        if after is None:
            return {"step": self.steps[-1]["step"], "next_step_s": None}
        return {"step": after["step"], "next_step_s": after["wall_s"] - at_s}


def read_run(folder: Path) -> RunRecord:
    """Read a run. Raises ReportError for a folder without a run, and NothingTrained for a run without a step."""
    run = read_attempt(folder)
    if not run.steps:
        raise NothingTrained(f"{folder}: no step was trained yet; --serve waits for the first one")
    return run


def read_attempt(folder: Path) -> RunRecord:
    """Read a run even without a step, such as a failed one of a sweep. Raises ReportError as `read_run`."""
    check_folder(folder)
    notes: list[str] = []
    steps = [with_new_names(line) for line in read_jsonl(folder / "metrics.jsonl", notes) if "step" in line]
    events = [event for event in read_jsonl(folder / "events.jsonl", notes) if "at_s" in event]
    text = _text(folder / "config.yaml")
    overrides = _overrides(_text(folder / ".hydra" / "overrides.yaml"), notes)
    return RunRecord(folder, steps, read_summary(folder, notes), _config(text, notes), text, overrides, events, notes)


def runs_of(folder: Path) -> list[Path]:
    """Return the runs of a sweep's folder in order; any other folder stands for itself."""
    if _is_run(folder) or not folder.is_dir():
        return [folder]
    runs = [inner for inner in folder.iterdir() if inner.is_dir() and _is_run(inner)]
    return sorted(runs, key=_natural) or [folder]


def is_sweep(runs: Sequence[RunRecord]) -> bool:
    """Tell whether some of these runs come from one Hydra multirun whose overrides are on record."""
    parents = {run.folder.resolve().parent for run in runs}
    return len(parents) == 1 and (parents.pop() / "multirun.yaml").is_file() and any(run.overrides for run in runs)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", ".hydra"))


def _natural(folder: Path) -> list[tuple[bool, int, str]]:
    """Sort key that puts 2 before 10."""
    parts = re.split(r"(\d+)", folder.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def check_folder(folder: Path) -> None:
    """Raise ReportError when the folder holds no run."""
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "no such folder"
        raise ReportError(f"{folder}: {wrong}; name the folder of a run, as in {_EXAMPLE}")
    if not _is_run(folder):
        raise ReportError(
            f"{folder} holds no metrics.jsonl, so it is not the folder of a run; name one, as in {_EXAMPLE}"
        )


def read_rollouts(folder: Path, notes: list[str], most: int = 3000, most_bytes: int = 12_000_000) -> list[Record]:
    """Return the sampled groups; too many for a page are thinned out evenly, the last one always included.

    `most_bytes` limits the texts, and the tokens separately: fewer groups may come with their tokens.
    """
    groups = read_jsonl(folder / "rollouts.jsonl", notes)
    tokens = [group.pop("tokens", None) for group in groups]
    kept = _thinned(groups, most, most_bytes)
    if len(kept) < len(groups):
        notes.append(f"The page holds {len(kept):,} of {len(groups):,} sampled groups, spread evenly over the run.")
    known = [place for place in kept if tokens[place]]
    shown = [known[place] for place in _thinned([tokens[place] for place in known], most, most_bytes)]
    if len(shown) < len(known):
        notes.append(f"The page holds the tokens of {len(shown):,} of {len(known):,} groups; rollouts.jsonl has all.")
    for place in shown:
        groups[place]["tokens"] = tokens[place]
    return [groups[place] for place in kept]


def _thinned(records: Sequence[Any], most: int, most_bytes: int) -> list[int]:
    """Return evenly spaced indices of as many records as there is room for, the last one included."""
    sample = records[:: max(1, len(records) // 50)]
    size = len(records) * fmean(len(json.dumps(record)) for record in sample) if sample else 0
    keep = min(most, len(records), max(1, int(len(records) * most_bytes / max(1, size))))
    last = len(records) - 1
    return [last - place * len(records) // keep for place in range(keep)][::-1]


def read_jsonl(file: Path, notes: list[str]) -> list[Record]:
    """Return the records of a file, none if it doesn't exist. Unreadable lines are skipped and noted."""
    records, broken = [], 0
    for line in _text(file).split("\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record, broken = None, broken + 1
        if isinstance(record, dict):
            records.append(record)
    if broken:
        notes.append(f"{file.name}: {broken} broken {'line was' if broken == 1 else 'lines were'} skipped.")
    return records


def figures(run: RunRecord) -> Record:
    """Return the numbers for the overview and the comparison table, from the summary or else from the steps."""
    rewards = [step["reward/mean"] for step in run.steps if step.get("reward/mean") is not None]
    tenth, seconds = max(1, len(rewards) // 10), total(run, "time/step_s")
    evaluations = [each["reward_mean"] for each in run.evaluations if each.get("reward_mean") is not None]
    last = run.steps[-1] if run.steps else {"step": 0}
    started = run.steps or run.config_text
    # A run that was killed has no summary; its steps say nearly as much.
    found: Record = {
        "status": "no summary: still running, or killed" if started else "failed",
        "steps": last["step"],
        "wall_s": last.get("wall_s"),
        "reward_first": fmean(rewards[:tenth]) if rewards else None,
        "reward_last": fmean(rewards[-tenth:]) if rewards else None,
        "eval_first": evaluations[0] if evaluations else None,
        "eval_last": evaluations[-1] if len(evaluations) > 1 else None,
        "trainer_wait_fraction": total(run, "time/trainer_wait_s") / seconds if seconds else None,
        "generator_busy_fraction": _weighted(run, "generator/busy_fraction"),
        "restarts": {"": last.get("recovery/restarts", 0)},
        "error": None if started else "never started: its settings were refused, or it was stopped before",
    }
    found |= {name: run.summary[name] for name in found if name in run.summary}
    groups = run.config.get("trainer.groups_per_step")
    return found | {
        "restarts": sum(found["restarts"].values()),
        "step_s": seconds / len(run.steps) if seconds else None,
        "groups_per_s": len(run.steps) * groups / seconds if groups and seconds else None,
        "tokens_per_s": _weighted(run, "generator/tokens_per_s"),
    }


def differing(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the settings in which the runs differ, with the value of each run; of a sweep only overridden ones.

    `resume` and `checkpoint.dir` don't count.
    """
    overridden = is_sweep(runs)
    keys = dict.fromkeys(key for run in runs for key in (run.overrides if overridden else run.config))
    values = {key: [run.config.get(key, run.overrides.get(key)) for run in runs] for key in keys}
    ignored = ("resume", "checkpoint.dir")
    return {key: each for key, each in values.items() if key not in ignored and len(set(map(repr, each))) > 1}


def total(run: RunRecord, name: str) -> float:
    return float(sum(step.get(name) or 0.0 for step in run.steps))


def _weighted(run: RunRecord, name: str) -> float | None:
    """Return a mean over time, not over steps."""
    pairs = [(step[name], step.get("time/step_s") or 0.0) for step in run.steps if step.get(name) is not None]
    seconds = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / seconds if seconds else None


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


def _overrides(text: str, notes: list[str]) -> Record:
    try:
        named = [str(each).lstrip("+") for each in OmegaConf.create(text or "[]") if "=" in str(each)]
        pairs = [each.partition("=") for each in named]
        # A dotlist is parsed nearly as Hydra parses values: `1e-4` is a number.
        return {name: OmegaConf.from_dotlist([f"value={text}"])["value"] for name, _, text in pairs}
    except (OmegaConfBaseException, YAMLError):
        notes.append(".hydra/overrides.yaml can't be read.")
        return {}


def _flat(config: Any, prefix: str = "") -> Record:
    if not isinstance(config, dict):
        return {prefix: config}
    inner = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in inner for key, value in part.items()}
