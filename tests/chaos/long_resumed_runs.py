"""More of test_resumed_runs.py, for `make chaos`: exact losses, and what is refused."""

import signal

from tests.chaos.test_resumed_runs import SMALL, kill_after, moments, records, trained
from tests.scripts.conftest import run_script, train
from tests.scripts.processes import finish

__all__ = ["moments", "run_script", "train"]


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
