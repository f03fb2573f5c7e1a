"""The default experiment, shortened: the reward rises, on the very path that a user takes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_default_experiment_learns(tmp_path):
    """With the user's cache: the warm start is made once per machine."""
    overrides = ["trainer.max_steps=60", "seed=11", f"hydra.run.dir={tmp_path}/run"]
    subprocess.run([sys.executable, str(ROOT / "scripts/train.py"), *overrides], cwd=tmp_path, check=True, timeout=300)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "completed"
    assert 0.2 <= summary["eval_first"] <= 0.5
    assert summary["eval_last"] >= 0.85
    assert summary["reward_last"] >= 0.85
    assert summary["max_policy_age_seen"] <= 1
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(step["mismatch/same_version_abs"] for step in steps if "mismatch/same_version_abs" in step) < 1e-3
