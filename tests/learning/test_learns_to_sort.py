"""The default experiment, shortened: the reward rises, on the very path that a user takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def test_the_default_experiment_learns(tmp_path):
    """With the user's cache: the warm start is made once per machine."""
    overrides = ["trainer.max_steps=60", "eval.prompts=128", "seed=11", f"hydra.run.dir={tmp_path}/run"]
    subprocess.run([sys.executable, str(ROOT / "scripts/train.py"), *overrides], cwd=tmp_path, check=True, timeout=1200)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "completed"
    assert 0.2 <= summary["eval_first"] <= 0.5
    assert summary["eval_last"] >= 0.85
    assert summary["reward_last"] >= 0.85
    assert summary["max_policy_age_seen"] <= 1
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (
        max(
            step["mismatch/logprob_abs_diff_same_version"]
            for step in steps
            if "mismatch/logprob_abs_diff_same_version" in step
        )
        < 1e-3
    )


def test_adapters_alone_learn_it_too(tmp_path):
    """On the same path, and by broadcast; what is published at every step are the adapters, to the last byte."""
    overrides = ["lora=r16", "trainer.lr=3e-3", "trainer.max_steps=50", "weight_sync.transport=collective", "seed=11"]
    overrides += ["eval.prompts=128", f"hydra.run.dir={tmp_path}/run"]
    subprocess.run([sys.executable, str(ROOT / "scripts/train.py"), *overrides], cwd=tmp_path, check=True, timeout=1200)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["max_policy_age_seen"] <= 1) == ("completed", True)
    assert 0.2 <= summary["eval_first"] <= 0.5
    assert summary["eval_last"] >= 0.8
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    shapes = [*[(128, 128)] * 4, *[(384, 128)] * 2, (128, 384)]  # of a layer's matrices
    adapters = 4 * 4 * sum(16 * (rows + columns) for rows, columns in shapes)
    assert {step["trainer/published_bytes/mean"] for step in steps if "trainer/published_bytes/mean" in step} == {
        adapters
    }
    assert (
        max(
            step["mismatch/logprob_abs_diff_same_version"]
            for step in steps
            if "mismatch/logprob_abs_diff_same_version" in step
        )
        < 1e-3
    )
    [checkpoint] = (tmp_path / "run/checkpoints").glob("step_000050")
    kept = 3 * adapters  # with both of Adam's moments
    assert kept < (checkpoint / "trainer.safetensors").stat().st_size < 1.2 * kept
