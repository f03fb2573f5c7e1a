"""`scripts/train.py` as a process that is killed with SIGKILL and resumed, until it is through."""

import json
import random
import signal
import time

import pytest

from tests.scripts.conftest import start, train
from tests.scripts.processes import finish, processes_of

__all__ = ["start", "train"]

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


def test_a_run_killed_at_any_moment_goes_on_and_is_through_in_the_end(train, tmp_path, moments):
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

    code, stdout, stderr = finish(train(*settings))
    assert (code, stderr) == (0, "")
    assert stdout.endswith(f"step_{steps:06d} is of the last step: nothing is left to do\n")
    assert json.loads((run / "summary.json").read_text()) == summary


def test_step_by_step_the_killed_and_resumed_run_learns_what_an_undisturbed_one_does(train, tmp_path, moments):
    settings = (
        *SMALL, "eval.prompts=0", f"trainer.max_steps={9 * (1 + len(moments))}", "buffer.max_policy_age=0",
        "rollout.concurrency=1", "trainer.lr=0.01", "+reward.functions={tests.fake_rewards.vowel_share: 1.0}",
    )  # fmt: skip
    whole = train(*settings, "hydra.run.dir=undisturbed")
    for moment in moments:
        kill_after(train(*settings, "hydra.run.dir=run"), *moment)
    for process in (whole, train(*settings, "hydra.run.dir=run")):
        code, _, stderr = finish(process)
        assert (code, stderr) == (0, "")
    killed, undisturbed = (
        [(line["step"], line["loss"], line["reward/mean"]) for line in records(tmp_path / folder, "metrics.jsonl")]
        for folder in ("run", "undisturbed")
    )
    assert killed == undisturbed
    assert any(loss for _, loss, _ in killed)
    assert trained(tmp_path / "run") == trained(tmp_path / "undisturbed")


def test_what_must_not_be_resumed_is_refused_in_one_line(train, tmp_path):
    """A run that is still going, other settings; and a dated folder that is not needed is not left."""
    settings = (*SMALL, "rollout.concurrency=8", "trainer.max_steps=100000", "eval.prompts=0", "checkpoint.every=1")
    process = train(*settings)
    assert any(line.startswith("step") and " 3/" in line for line in process.stdout)
    process.send_signal(signal.SIGSTOP)  # it lives, and leaves the processor to the others
    [run] = tmp_path.glob("outputs/*/*")
    code, stdout, stderr = finish(train(*settings, f"resume={run}"))
    assert (code, len(stderr.splitlines())) == (1, 1)
    assert stderr.startswith(f"error: hydra.run.dir: {run} is in use by another run")
    kill_after(process, 0)

    code, stdout, stderr = finish(train(*settings, "seed=7"))
    assert code == 1
    assert stderr == (
        "error: resume: the checkpoint has other settings: seed was 0, is 7; set them back, or start a new run\n"
    )
    assert "starting Ray" not in stdout
    assert list(tmp_path.glob("outputs/*/*")) == [run]
