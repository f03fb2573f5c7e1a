"""What the benchmark against TRL makes of what two trainings leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.long

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    """Imports modules of the benchmarks."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: __import__(f"benchmarks.{name}", fromlist=[name])
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_rate_leaves_the_warm_up_out(bench):
    training = bench("peer_case").Training(3.0, [10.0, 11.0, 11.5, 12.0], 8.0, 0.0)
    assert training.samples_per_s(warm_up=2) == pytest.approx(2 * 128 / 1.0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ({0: 0.3, 2: 0.8, 4: 1.0}, 3.0),  # half-way between the ends of steps 2 and 4
        ({0: 0.3, 4: 0.3, 2: 0.6}, None),
        ({0: 0.5, 2: 1.0, 4: 0.2}, 1.6),  # the first time counts, from the start that took no time
        ({0: 0.95, 2: 1.0}, 0.0),
    ],
)
def test_the_time_to_a_reward_lies_between_two_measured_steps(bench, rewards, expected):
    training = bench("peer_case").Training(3.0, [1.0, 2.0, 3.0, 4.0], 8.0, 0.0)
    found = training.seconds_to(0.9, rewards)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_run_folder_is_read(bench, tmp_path):
    lines = [
        {"time/step_s": 2.0, "trainer/tokens": 640.0, "generator/truncated_fraction": 0.5},
        {"time/step_s": 1.0, "trainer/tokens": 896.0},
        {"time/step_s": 1.0, "trainer/tokens": 1152.0, "generator/truncated_fraction": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"startup_s": {"imports": 4.0, "first_step": 3.0}}))
    (tmp_path / "checkpoints" / "step_000020" / "model").mkdir(parents=True)
    training = bench("peer_runs").read_ours(tmp_path)
    assert (training.startup_s, training.ended_s) == (7.0, [2.0, 3.0, 4.0])
    assert (training.mean_tokens, training.truncated) == (7.0, 0.25)
    assert training.saved == {20: tmp_path / "checkpoints" / "step_000020" / "model"}


def test_a_command_that_fails_or_hangs_is_told_with_what_it_said(bench, tmp_path):
    finish = bench("peer_runs").finish
    with pytest.raises(RuntimeError, match=r"ended with 3; the last it said:\nno model"):
        finish([sys.executable, "-c", "print('no model'); exit(3)"], tmp_path, 60)
    with pytest.raises(RuntimeError, match=r"did not end within 0\.2 s"):
        finish([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 0.2)


def test_memory_is_that_of_all_descendants(bench):
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        memory = bench("memory")
        while len(memory.family(child.pid)) < 2:
            os.sched_yield()
        assert memory.family(child.pid)[0] == child.pid
        assert memory.family(os.getpid())[0] == os.getpid()
        assert set(memory.family(child.pid)) < set(memory.family(os.getpid()))
        assert memory.used_gib(child.pid) > 0
        child.stdin.close()


def test_ragged_answers_have_their_mean_and_their_limit(bench):
    module = bench("peer_task")
    task, rng = module.Ragged(train_size=50, held_out_size=5), np.random.default_rng(0)
    problem = task.problems("train")[0]
    tokens = np.array([len(task.demonstration(problem, rng)) + 1 for _ in range(2000)])
    assert tokens.max() == module.MOST_TOKENS
    assert tokens.mean() == pytest.approx(module.MEAN_TOKENS, rel=0.1)
    assert task.score(problem, problem.question[0] + "?") == 0.5
    assert task.score(problem, "") == 0.0
