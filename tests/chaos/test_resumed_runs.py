"""`scripts/train.py` as a process that is killed with SIGKILL and resumed, until it is through."""

import json
import random
import signal
import time

import pytest

from tests.scripts.conftest import run_script, train, type_in
from tests.scripts.processes import finish, processes_of

pytestmark = pytest.mark.long

__all__ = ["run_script", "train", "type_in"]

SMALL = (
    "resume=auto", "checkpoint.every=3", "trainer.groups_per_step=4", "rollout.group_size=4",
    "rollout.max_completion_tokens=8", "reward.workers=1",
)  # fmt: skip


@pytest.fixture
def moments(kills):
    """For each kill, how many lines the process prints before it (the start, evaluations, steps), and seconds after."""
    draw = random.Random(7)
    return [(draw.randrange(2, 12), draw.uniform(0.0, 0.3)) for _ in range(max(1, kills // 6))]


def kill_after(process, lines, seconds=0.0):
    """SIGKILL it when it has printed so many lines, and let nothing of it stay."""
    for _ in zip(range(lines), process.stdout, strict=False):
        pass
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert processes_of(process.pid) == []


def records(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def trained(folder):
    return [entry for line in records(folder, "ledger.jsonl") for entry in line.get("trained", ())]


def test_a_run_killed_at_any_moment_goes_on_and_is_through_in_the_end(train, type_in, tmp_path, moments):
    steps = 9 * (1 + len(moments))  # more than there can be lines before all the kills
    settings = (*SMALL, "hydra.run.dir=run", f"trainer.max_steps={steps}", "eval.prompts=8")
    for moment in moments:
        kill_after(train(*settings), *moment)
    code, stdout, stderr = finish(train(*settings))
    assert (code, stderr) == (0, "")
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", steps)
    assert [line["step"] for line in records(run, "metrics.jsonl")] == list(range(1, steps + 1))
    tickets, prompts = zip(*trained(run), strict=True)
    assert list(tickets) == list(range(4 * steps))
    assert sorted(prompts) == list(range(4 * steps))
    assert summary["groups_admitted"] == summary["groups_trained"] + summary["groups_in_flight"]
    assert [evaluation["step"] for evaluation in summary["evaluations"]] == [0, steps]
    assert summary["max_policy_age_seen"] <= 1

    code, stdout, stderr = type_in("train.py", *settings)
    assert (code, stderr) == (0, "")
    assert stdout.endswith(f"step_{steps:06d} is of the last step: nothing is left to do\n")
    assert json.loads((run / "summary.json").read_text()) == summary
