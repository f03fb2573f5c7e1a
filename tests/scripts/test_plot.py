"""`python scripts/plot.py` as a user types it."""

import json
import subprocess
import sys


def run_folder(folder, evaluations):
    folder.mkdir()
    steps = [{"step": step, "reward/mean": step / 20} for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "summary.json").write_text(json.dumps({"evaluations": evaluations}))
    return str(folder)


def test_runs_are_drawn_side_by_side(tmp_path):
    one = {"step": 0, "reward_mean": 0.1, "reward_stderr": None}  # NaN, as a run writes it
    first = run_folder(tmp_path / "first", [one, {"step": 20, "reward_mean": 0.9, "reward_stderr": 0.02}])
    second = run_folder(tmp_path / "second", [])
    picture = tmp_path / "curve.svg"
    command = [sys.executable, "scripts/plot.py", first, second, "--out", str(picture)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    text = picture.read_text()
    for label in ("first: training batches", "first: held-out", "second: training batches"):
        assert f"<!-- {label} -->" in text
    assert "second: held-out" not in text
