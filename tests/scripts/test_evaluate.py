"""`python scripts/evaluate.py` as a user types it."""

import json
import os
import signal

import pytest

from tests.scripts.processes import finish, only_run, processes_of

REWARD = "+reward.functions={tests.fake_rewards.vowel_share: 1.0}"


@pytest.mark.long
def test_a_table_and_two_files(evaluate, tmp_path):
    code, stdout, stderr = finish(evaluate("eval.prompts=8", "eval.samples=2", "eval.success_threshold=0.2", REWARD))
    assert (code, stderr) == (0, "")
    assert "prompts 8/8" in stdout
    folder = only_run(tmp_path)
    assert f"completed; run folder: {folder}" in stdout
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["prompts"], result["prompts_left_out"], result["samples"]) == (8, 0, 2)
    assert f"{result['reward_mean']:.3f} ± {result['reward_stderr']:.3f}" in stdout
    assert f"{result['pass@2']:.3f}" in stdout
    answered = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert sorted(line["prompt_serial"] for line in answered) == list(range(8))
    assert all(len(line["completions"]) == len(line["rewards"]) == 2 for line in answered)
    rewards = [reward for line in answered for reward in line["rewards"]]
    assert sum(rewards) / 16 == pytest.approx(result["reward_mean"]) != 0
    solved = sum(max(line["rewards"]) >= 0.2 for line in answered)
    assert result["pass@2"] == solved / 8
    assert "path:" in (folder / "config.yaml").read_text()
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.long
def test_ctrl_c_ends_it_in_order_and_leaves_no_process(evaluate, tmp_path):
    """Half of the answers take less than a second, others hours."""
    slow = ["generator.engine=simulated", "+generator.args={latency_s: 1, latency_sigma: 8}"]
    process = evaluate("eval.prompts=32", *slow)
    for line in process.stdout:
        if line.startswith("prompts"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody at once
    code, stdout, stderr = finish(process)
    assert (code, stderr) == (130, "")
    assert "stopping; press Ctrl-C again" in stdout
    assert "interrupted; run folder" in stdout
    folder = only_run(tmp_path)
    assert not (folder / "evaluation.json").exists()
    assert 0 < len((folder / "completions.jsonl").read_text().splitlines()) < 32
    assert processes_of(process.pid) == []


@pytest.mark.long
def test_a_reward_that_fails_is_shown_once(evaluate, tmp_path):
    code, stdout, stderr = finish(evaluate("eval.prompts=8", "+reward.functions={tests.fake_rewards.raising: 1.0}"))
    assert code == 1
    assert stderr.startswith("error: RewardError: reward 'tests.fake_rewards.raising' on prompt")
    assert len(stderr.splitlines()) == 1
    assert "failed; run folder" in stdout
    assert "Traceback" in (only_run(tmp_path) / "run.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.prompts=0"], "error: eval.prompts: must be > 0 (number of held-out prompts)"),
        (["eval.sample=2"], "error: eval.sample: no such key; did you mean eval.samples?"),
        (["generator.replicas=500"], "error: generator.num_cpus: the actors ask for 500 CPUs"),
        (["task.args.held_out_size=0"], "error: eval.prompts: the task has no held-out prompt"),
        (["eval.samples=4", "eval.temperature=0"], "error: eval.samples: is 4, but at temperature 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(type_in, overrides, message):
    code, stdout, stderr = type_in("evaluate.py", *overrides)
    assert code == 1
    assert stderr.startswith(message)
    assert len(stderr.splitlines()) == 1
    assert "Traceback" not in stdout


def test_a_folder_that_holds_an_evaluation_is_not_used_again(type_in, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/completions.jsonl").touch()
    code, _, stderr = type_in("evaluate.py", f"hydra.run.dir={tmp_path}/run")
    assert code == 1
    assert "already holds a run; name another folder" in stderr


def test_a_dry_run_prints_who_would_be_started(type_in):
    code, stdout, stderr = type_in("evaluate.py", "dry_run=true", "generator.replicas=2", "generator.num_cpus=0")
    assert (code, stderr) == (0, "")
    assert "generator" in stdout
    assert "trainer" not in stdout
