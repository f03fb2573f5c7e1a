"""Starts one training with this framework or with TRL, and reads what it left."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.memory import PeakMemory
from benchmarks.peer_case import COMPLETIONS, PROMPTS_PER_STEP, SAMPLES_PER_STEP, Case, Training
from grpo.config.algorithm import TaskConfig
from grpo.models.loading import cached
from grpo.tasks.base import make_task

_SCRIPTS = Path(__file__).parents[1]
# torch may lie on the machine as a build for CPUs, which PyPI's newest is not
_TRL = ("trl==1.16.0", "transformers==5.24.0", "torch>=2.11,<2.14")
_INSTALL_S, _TRAIN_S = 1800, 900
_NOT_MEASURED = ("eval.prompts=0", "observe.report=false")


def trl_python() -> Path:
    """The interpreter of an environment with TRL, made on the first call and found in the cache afterwards."""

    def make(folder: Path) -> None:
        finish([sys.executable, "-m", "venv", str(folder)], folder.parent, _INSTALL_S)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        finish([*pip, *_TRL], folder.parent, _INSTALL_S)

    name = "-".join(requirement.replace("==", "-") for requirement in _TRL[:2])
    return cached(name, make) / "bin" / "python"


def train_ours(case: Case, folder: Path) -> Training:
    """With `scripts/train.py` and its default experiment, whose other settings are left as they are."""
    run_dir = folder / "run"
    overrides = [
        "model=hf",
        f"model.path={case.model}",
        f"task.target={case.task}",
        f"rollout.max_completion_tokens={case.most_tokens}",
        f"trainer.max_steps={case.steps}",
        f"trainer.groups_per_step={PROMPTS_PER_STEP}",
        f"rollout.group_size={COMPLETIONS}",
        f"trainer.lr={case.lr}",
        f"trainer.lr_schedule={case.lr_schedule}",
        f"seed={case.seed}",
        f"checkpoint.every={case.save_every}",
        f"checkpoint.keep={max(1, case.steps)}",
        *_NOT_MEASURED,
        f"hydra.run.dir={run_dir}",
    ]
    peak_gib = finish([sys.executable, str(_SCRIPTS / "train.py"), *overrides], folder, _TRAIN_S)
    return dataclasses.replace(read_ours(run_dir), peak_gib=peak_gib)


def read_ours(run_dir: Path) -> Training:
    """What a run's folder says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    ended_s, now_s = [], 0.0
    for line in lines:
        now_s += line["time/step_s"]
        ended_s.append(now_s)
    return Training(
        startup_s=sum(summary["startup_s"].values()),
        ended_s=ended_s,
        # of those trained on, in the order of admission: of those finished, long ones are still under way at the end
        mean_tokens=_mean_of(lines, "trainer/tokens") / SAMPLES_PER_STEP,
        truncated=_mean_of(lines, "generator/truncated_fraction"),
        saved={_step(path): path / "model" for path in run_dir.glob("checkpoints/step_*")},
    )


def train_trl(case: Case, folder: Path) -> Training:
    task = make_task(TaskConfig(case.task))
    prompts = ({"prompt": problem.question, "answer": problem.answer} for problem in task.problems("train"))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)), encoding="utf-8")
    peak_gib = finish([str(trl_python()), "-m", "benchmarks.peer_trl", str(folder)], folder, _TRAIN_S)
    said = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    saved = {_step(path): path for path in folder.glob("models/step_*")}
    return Training(**said, peak_gib=peak_gib, saved=saved)


def finish(command: Sequence[str], folder: Path, timeout_s: float) -> float:
    """Run a command to its end and give the peak of its memory in GiB; what it printed is shown if it fails."""
    log = folder / "log.txt"
    env = os.environ | {
        "PYTHONPATH": f"{_SCRIPTS.parent}{os.pathsep}{_SCRIPTS}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        with PeakMemory(process.pid) as memory:
            code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code != 0:
        ended = f"did not end within {timeout_s:g} s" if code is None else f"ended with {code}"
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command[:3])} {ended}; the last it said:\n{last}")
    return memory.peak_gib


def _mean_of(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """Of the lines that have it."""
    return fmean(line[name] for line in lines if line.get(name) is not None)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
