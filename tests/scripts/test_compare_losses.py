"""`python scripts/compare_losses.py` as a user types it, and its table from made-up runs."""

import importlib
import json
import os
import signal
import time
from dataclasses import replace
from threading import Event

import pytest

import scripts.comparison.runs as comparison_runs
from scripts.comparison.table import Setting, cell, page, rows
from tests.scripts.conftest import ROOT
from tests.scripts.processes import finish, processes_of

REWARD = "+reward.functions={tests.fake_rewards.vowel_share: 1.0}"
TINY = [
    "driver.slow_callback_ms=1e5",
    "trainer.max_steps=2",
    "trainer.groups_per_step=2",
    "rollout.group_size=4",
    "eval.prompts=8",
]
ONE = ["--losses", "grpo", "--seeds", "0", "--correction", "--jobs", "1", "--out", "docs/losses.md"]


@pytest.fixture
def compare(run_script):
    return lambda *words: run_script("compare_losses.py", *ONE, *TINY, *words)


@pytest.fixture
def again(type_in, monkeypatch):
    """As `compare`, in this process: where no run is made."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda *words: type_in("compare_losses.py", *ONE, *TINY, *words)


def runs(tmp_path):
    return json.loads((tmp_path / "docs/losses.json").read_text())["runs"]


@pytest.mark.long
def test_runs_are_made_once_and_end_at_the_target_or_the_last_step(compare, again, tmp_path):
    code, stdout, stderr = finish(compare("--ages", "0", "1", "--target", "2", REWARD))
    assert (code, stderr) == (0, "")
    synchronous, aged = runs(tmp_path)
    assert (synchronous["age"], synchronous["steps"], synchronous["age_mean"]) == (0, 2, 0.0)
    assert (aged["age"], aged["steps"], aged["age_mean"]) == (1, 2, 0.5)
    assert [step for step, _ in aged["evaluations"]] == [0, 2]
    assert aged["reached_step"] is aged["error"] is None
    shown = [f">2, best {run['reward_best']:.2f}" for run in (synchronous, aged)]
    markdown = (tmp_path / "docs/losses.md").read_text()
    assert f"| grpo | none | {' | '.join(shown)} |" in markdown
    assert "| mean age seen | none | 0.00 | 0.50 |" in markdown
    assert "python scripts/compare_losses.py --losses grpo" in markdown
    assert "2 of 2 runs to make" in stdout
    assert all(text in stdout for text in shown)

    code, stdout, stderr = again("--ages", "0", "1", "--target", "2", REWARD)
    assert (code, stderr) == (0, "")
    assert "0 of 2 runs to make" in stdout
    assert all(text in stdout for text in shown)
    assert runs(tmp_path) == [synchronous, aged]


@pytest.fixture
def make_run(tiny_config, monkeypatch):
    """One run in this process."""
    tiny_config.eval.prompts, tiny_config.eval.every, tiny_config.eval.replicas = 8, 1, 0
    monkeypatch.setattr(comparison_runs, "_stop", Event(), raising=False)
    return lambda target: comparison_runs.make_run(tiny_config, target)


def test_a_run_ends_with_the_evaluation_that_reaches_the_target(make_run):
    whole = make_run(2.0)
    assert (whole["steps"], whole["reached_step"]) == (3, None)
    assert [step for step, _ in whole["evaluations"]] == [0, 1, 2, 3]
    rewards = [reward for _, reward in whole["evaluations"]]
    assert (whole["reward_best"], whole["reward_last"]) == (max(rewards), rewards[-1])
    at_once = make_run(rewards[0])
    assert (at_once["reached_step"], at_once["reached_s"], at_once["steps"]) == (0, 0, 0)


def test_a_run_that_fails_says_why(make_run, tiny_config):
    tiny_config.reward.functions = {"tests.fake_rewards:raising": 1.0}
    failed = make_run(2.0)
    assert failed["error"].startswith("RewardError: ")
    assert failed["reached_step"] is None


def test_a_run_that_failed_is_made_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    results = importlib.import_module("compare_losses").Results
    before = results(tmp_path / "losses.json")
    before.add({"key": "good", "error": None})
    before.add({"key": "bad", "error": "ValueError: none"})
    after = results(tmp_path / "losses.json")
    assert [after.is_made(key) for key in ("good", "bad", "new")] == [True, False, False]
    after.add({"key": "bad", "error": None})
    assert results(tmp_path / "losses.json").is_made("bad")


@pytest.mark.long
def test_ctrl_c_ends_it_in_order_and_leaves_nothing_behind(compare, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = compare("--ages", "0", "1", "--target", "2", "trainer.max_steps=100000", REWARD)
    while process.poll() is None and not list(tmp_path.glob("tmp/compare-losses-*/run/metrics.jsonl")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stderr) == (130, "")
    assert "interrupted; the same command goes on" in stdout
    assert processes_of(process.pid) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "docs/losses.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--losses", "gpro"], "argument --losses: invalid choice: 'gpro'"),
        (["--correction", "tsi"], "argument --correction: 'tsi' is not one of"),
        (["--jobs", "0"], "argument --jobs: at least one"),
        (["seed=3"], "seed=3: the comparison sets this itself"),
        (["trainer.max_step=3"], "trainer.max_step: no such key; did you mean trainer.max_steps?"),
        (["--json", str(ROOT / "pyproject.toml")], "pyproject.toml holds no comparison"),
    ],
)
def test_what_can_not_be_compared_is_one_line(words, message, monkeypatch, capsys, tmp_path, tiny_model_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    model = ["model=hf", f"model.path={tiny_model_path}"]
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("compare_losses").main([*ONE, *words, *model])
    assert message in capsys.readouterr().err.splitlines()[-1]


def record(step=None, seconds=None, best=0.5, age=0.0, error=None):
    return {
        "reached_step": step,
        "reached_s": seconds,
        "reward_best": best,
        "age_mean": age,
        "max_steps": 150,
        "error": error,
    }


def test_a_cell_shows_the_median_run():
    fast, slow, never = record(10, 2.0, best=0.95), record(30, 7.4, best=0.9), record(best=0.87)
    assert cell([]) == ""
    assert cell([slow]) == "30 (7 s)"
    assert cell([slow, never, fast]) == "30 (7 s), 2 of 3"
    assert cell([slow, fast]) == "20 (5 s)"
    assert cell([never, fast]) == ">150, best 0.91, 1 of 2"  # the median of two is no step at all
    assert cell([never, fast, record(best=0.8)]) == ">150, best 0.87, 1 of 3"
    assert cell([never, record(best=0.8)]) == ">150, best 0.83"


def test_a_run_that_failed_counts_apart_and_is_named():
    failed = record(best=None, age=None, error="NonFiniteError: 11 steps in a row: were not finite")
    assert cell([failed]) == "1 failed: NonFiniteError"
    assert cell([record(10, 2.0), failed, failed]) == "10 (2 s); 2 failed: NonFiniteError"


def test_a_loss_has_a_line_for_each_correction_and_an_age_a_column():
    first = Setting("grpo", "none", 0, 0)
    both = [replace(first, age=4, correction=correction) for correction in ("none", "tis")]
    other = [replace(setting, loss="gspo") for setting in (first, *both)]
    found = dict.fromkeys([first, *other], record(10, 2.0, age=3.0)) | {both[0]: record(20, 4.0, age=4.0)}
    table = rows([first, *both, *other], found)
    assert table == [
        ["loss", "correction", "age 0", "age 4"],
        ["grpo", "none", "10 (2 s)", "20 (4 s)"],
        ["", "tis", "", ""],
        ["gspo", "none", "10 (2 s)", "10 (2 s)"],
        ["", "tis", "", "10 (2 s)"],
        ["mean age seen", "none", "3.00", "3.50"],
        ["", "tis", "", "3.00"],
    ]
    markdown = page(table, "A title", "python it", "2 cores").splitlines()
    assert markdown[5:9] == [
        "| loss | correction | age 0 | age 4 |",
        "|---|---|---|---|",
        "| grpo | none | 10 (2 s) | 20 (4 s) |",
        "|  | tis |  |  |",
    ]
