"""Draw the reward of runs over their steps: `python scripts/plot.py RUN_FOLDER [RUN_FOLDER ...] --out curve.svg`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

_WINDOW = 9  # steps of the moving average


def draw(axes: Axes, name: str, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """Draw the batch reward, faint, and its moving average; held-out evaluations as points with standard errors."""
    reward = np.array([step["reward/mean"] for step in steps])
    numbers = np.array([step["step"] for step in steps])
    window = min(_WINDOW, len(reward))
    smooth = np.convolve(reward, np.ones(window) / window, mode="valid")
    (line,) = axes.plot(numbers[window // 2 :][: len(smooth)], smooth, label=f"{name}: training batches")
    axes.plot(numbers, reward, color=line.get_color(), alpha=0.25, linewidth=0.8)
    if evaluations:
        axes.errorbar(
            [evaluation["step"] for evaluation in evaluations],
            [evaluation["reward_mean"] for evaluation in evaluations],
            [evaluation["reward_stderr"] or 0 for evaluation in evaluations],
            fmt="o", capsize=3, color=line.get_color(), label=f"{name}: held-out",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("reward.svg"), help="the picture; its ending says the format")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for run in args.runs:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        draw(axes, run.name, steps, json.loads((run / "summary.json").read_text(encoding="utf-8"))["evaluations"])
    axes.set(xlabel="train step", ylabel="mean reward", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
