import asyncio
import json

import pytest

from grpo.observe.loop_lag import LoopLag
from grpo.types import BatchReport, GenerationReport, GeneratorStats, Group, Problem, Prompt, Scores, Ticket


def record_steps(recorder, rewards):
    for step, reward in enumerate(rewards, start=1):
        recorder.group_finished(*finished_group(step, reward))
        times = recorder.stopwatch()
        for name in ("time/trainer_wait_s", "time/train_step_s", "time/weight_sync_s"):
            with times(name):
                pass
        batch = BatchReport((Ticket(step),), ((reward, reward),), groups_waiting=0)
        trained = {"loss": 0.1, "policy_age/max": step % 2, "policy_age/mean": 0.5}
        recorder.step_finished(step, trained, batch, [GeneratorStats(step * 0.001, step * 10)], times)


def finished_group(serial, reward):
    prompt = Prompt(serial, Problem("ba>", "ab"), None)
    group = Group(prompt, (), None, (reward, reward), (0.0, 0.0), oldest_version=0)
    texts = ("ab", "ba") if serial % 2 == 0 else ()
    return group, Scores((reward, reward), {"task": (reward, reward)}, texts), GenerationReport(0, 2, 6, 1)


@pytest.fixture
def recorded(tiny_config, make_recorder):
    _, recorder = make_recorder(tiny_config)
    record_steps(recorder, [i / 20 for i in range(20)])
    recorder.eval_first = 0.25
    summary = recorder.write_summary("failed", ValueError("what went wrong"))
    recorder.run_dir.close()
    return recorder.run_dir.path, summary


def test_the_pinned_metrics_are_in_every_line(recorded):
    path, _ = recorded
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 21))
    for name in (
        "wall_s", "reward/mean", "loss", "policy_age/max", "policy_age/mean", "time/trainer_wait_s",
        "time/train_step_s", "time/weight_sync_s", "generator/busy_fraction", "generator/tokens_per_s",
        "driver/loop_lag_p99_ms",
    ):  # fmt: skip
        assert all(name in step for step in steps), name
    assert steps[4]["generator/completion_tokens_mean"] == 3
    assert steps[4]["generator/truncated_fraction"] == 0.5


def test_the_summary_has_the_pinned_keys_and_means_over_tenths(recorded):
    path, summary = recorded
    assert json.loads((path / "summary.json").read_text()) == summary
    assert summary["status"] == "failed"
    assert summary["error"] == "ValueError: what went wrong"
    assert summary["reward_first"] == pytest.approx(0.025)
    assert summary["reward_last"] == pytest.approx(0.925)
    assert (summary["eval_first"], summary["eval_last"]) == (0.25, None)
    assert summary["max_policy_age_seen"] == 1
    assert set(summary) >= {
        "steps", "wall_s", "groups_admitted", "groups_trained", "groups_dropped", "trainer_wait_fraction",
        "generator_busy_fraction", "weight_sync_s_mean", "restarts",
    }  # fmt: skip


def test_groups_that_come_with_texts_are_kept(recorded):
    path, _ = recorded
    groups = [json.loads(line) for line in (path / "rollouts.jsonl").read_text().splitlines()]
    assert len(groups) == 10
    assert groups[0]["prompt"] == "ba>"
    assert groups[0]["completions"] == ["ab", "ba"]
    assert groups[0]["rewards"] == [0.05, 0.05]


def test_a_run_without_a_step_has_a_summary_too(tiny_config, make_recorder):
    _, recorder = make_recorder(tiny_config)
    summary = recorder.write_summary("interrupted")
    assert (summary["steps"], summary["reward_last"], summary["error"]) == (0, None, None)


async def test_loop_lag_sees_a_blocked_loop():
    import time

    lag = LoopLag()
    watching = asyncio.ensure_future(lag.watch())
    await asyncio.sleep(0.03)
    time.sleep(0.2)  # noqa: ASYNC251  # the very thing to be seen
    await asyncio.sleep(0.03)
    watching.cancel()
    assert lag.take_p99_ms() > 100
    assert lag.take_p99_ms() == 0
