import dataclasses
import json
import time
import weakref
from functools import partial
from typing import ClassVar

import pytest

from grpo.driver.recorder import TrainedStep
from grpo.errors import ActorDied, RewardTimeout, ZeroVarianceGroup
from grpo.observe.sinks.fanout import Sinks
from grpo.telemetry.metrics import MetricSet
from grpo.telemetry.recording import Span, TelemetryBatch
from grpo.types import (
    BatchReport,
    EvaluationReport,
    GenerationReport,
    GeneratorStats,
    Group,
    Problem,
    Prompt,
    Rollout,
    Scores,
    Ticket,
    Transcript,
    TurnText,
)


@pytest.fixture(autouse=True)
def many_tickets(tiny_config):
    tiny_config.trainer.groups_per_step = 30


def hand_out_tickets(recorder):
    """30 of them, for prompts of the serials 100 to 129."""
    outstanding = [[serial, 100 + serial] for serial in range(30)]
    recorder.pacer.restore({"admitted": 30, "trained": 0, "dropped": {}, "requeued": {}, "outstanding": outstanding})


def record_steps(recorder, rewards):
    hand_out_tickets(recorder)
    for step, reward in enumerate(rewards, start=1):
        recorder.group_finished(finished_group(step, reward))
        times = recorder.stopwatch()
        for name in ("time/trainer_wait_s", "time/train_step_s", "time/weight_sync_s"):
            with times(name):
                pass
        batch = batch_of(Ticket(step), reward)
        trained = {"loss": 0.1, "policy_age/max": step % 2, "policy_age/mean": 0.5}
        with recorder.metrics_line(TrainedStep(step, trained, batch, times), [GeneratorStats(step * 0.001, step * 10)]):
            pass


def batch_of(ticket, reward):
    return BatchReport((ticket,), ((reward, reward),), ((2, 4),), (0,), groups_waiting=0)


def finished_group(serial, reward, completions=()):
    prompt = Prompt(serial, Problem("ba>", "ab"), None)
    group = Group(prompt, completions, None, (reward, reward), (0.0, 0.0), oldest_version=0)
    texts = ("ab", "ba") if serial % 2 == 0 else ()
    scores, report = (
        Scores((reward, reward), {"task": (reward, reward)}, texts, '[[["ab",-0.5,3]],[]]' if texts else ""),
        GenerationReport(0, 0, (2, 4), (False, True)),
    )
    return Rollout(group, scores, report, shaped_rewards=(reward / 2, reward / 2))


def evaluation(step, reward):
    return EvaluationReport(step, 4, 0, reward, 0.1, {1: 0.5}, 4, 40, 1, seconds=2.0)


@pytest.fixture
def recorded(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    record_steps(recorder, [i / 20 for i in range(20)])
    recorder.evaluated(evaluation(0, reward=0.25))
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
        "driver/loop_lag_p50_ms", "driver/loop_lag_p99_ms", "driver/loop_lag_max_ms", "driver/slow_callbacks",
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
    assert groups[0]["tokens"] == [[["ab", -0.5, 3]], []]
    assert "turns" not in groups[0]


def test_groups_of_episodes_are_kept_with_their_turns(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    turns = (TurnText("16", "<", 0.0, "stop", 3, 1), TurnText("8", "", 1.0, "stop", 2, 0))
    episodes = (Transcript(turns, "done"), Transcript(turns[:1], "timeout"))
    group = finished_group(0, 1.0)
    scores = dataclasses.replace(group.scores, texts=tuple(map(str, episodes)), transcripts=episodes)
    recorder.group_finished(dataclasses.replace(group, scores=scores))
    recorder.run_dir.close()
    record = json.loads((recorder.run_dir.path / "rollouts.jsonl").read_text())
    assert record["completions"] == ["16\n| <\n8", "16\n| <"]
    assert record["ended_by"] == ["done", "timeout"]
    assert [len(each) for each in record["turns"]] == [2, 1]
    assert record["turns"][0][0] == {
        "sampled": "16", "given": "<", "reward": 0.0, "finish_reason": "stop", "sampled_tokens": 3, "given_tokens": 1,
    }  # fmt: skip


def lines(recorder):
    recorder.run_dir.close()
    return [json.loads(line) for line in (recorder.run_dir.path / "metrics.jsonl").read_text().splitlines()]


def test_an_evaluation_goes_into_the_next_line_under_its_own_step(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    record_steps(recorder, [0.1])
    recorder.evaluated(evaluation(0, reward=0.25))
    record_steps(recorder, [0.1, 0.1])
    first, second, third = lines(recorder)
    assert (second["eval/step"], second["eval/reward_mean"], second["eval/pass@1"]) == (0, 0.25, 0.5)
    assert (second["eval/completion_tokens_mean"], second["eval/truncated_fraction"]) == (10, 0.25)
    assert not any(name.startswith("eval") for name in {**first, **third})


def test_of_two_evaluations_the_newer_is_in_the_line_and_both_are_in_the_summary(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    recorder.evaluated(evaluation(5, reward=0.25))
    recorder.evaluated(evaluation(10, reward=0.75))
    record_steps(recorder, [0.1])
    summary = recorder.write_summary("completed")
    assert lines(recorder)[0]["eval/step"] == 10
    assert [record["step"] for record in summary["evaluations"]] == [5, 10]
    assert (summary["eval_first"], summary["eval_last"]) == (0.25, 0.75)


def test_skipped_evaluations_are_counted(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    recorder.evaluation_skipped(5, "the previous one is still running")
    record_steps(recorder, [0.1, 0.1])
    summary = recorder.write_summary("completed")
    assert [line.get("eval/skipped") for line in lines(recorder)] == [1, None]
    assert summary["evaluations_skipped"] == 1


def test_waiting_for_an_evaluation_is_no_part_of_a_step(tiny_config, make_recorder):
    """The generators' rates span it all the same: they worked meanwhile."""
    recorder = make_recorder(tiny_config)
    began = time.perf_counter()
    recorder.training_begins([GeneratorStats(0.0, 0)])
    with recorder.evaluation_wait():
        time.sleep(0.05)
    record_steps(recorder, [0.1, 0.1])
    took_s = time.perf_counter() - began
    first, second = lines(recorder)
    assert first["time/eval_s"] >= 0.05
    assert first["time/eval_s"] + first["time/step_s"] + second["time/step_s"] <= took_s
    assert first["generator/tokens_per_s"] <= 10 / 0.05
    assert "time/eval_s" not in second


def test_the_line_is_written_when_the_evaluation_after_the_step_fails(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    hand_out_tickets(recorder)
    batch = batch_of(Ticket(0), 0.1)
    trained = {"loss": 0.1, "policy_age/max": 0, "policy_age/mean": 0.0}
    times = recorder.stopwatch()
    for name in ("time/trainer_wait_s", "time/train_step_s", "time/weight_sync_s"):
        with times(name):
            pass
    with (
        pytest.raises(ValueError, match="no answer"),
        recorder.metrics_line(TrainedStep(1, trained, batch, times), [GeneratorStats(0.1, 1)]),
    ):
        raise ValueError("no answer")
    assert [line["step"] for line in lines(recorder)] == [1]


def test_a_run_without_a_step_has_a_summary_too(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    summary = recorder.write_summary("interrupted")
    assert (summary["steps"], summary["reward_last"], summary["error"]) == (0, None, None)


def test_the_ledger_names_every_group_that_was_trained_dropped_or_requeued(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    record_steps(recorder, [0.5])
    recorder.group_dropped(Ticket(7), RewardTimeout("slow"))
    recorder.groups_requeued([Ticket(3), Ticket(4)], "replay_buffer")
    recorder.groups_requeued([], "replay_buffer")
    recorder.run_dir.close()
    assert recorder.run_dir.read("ledger.jsonl") == [
        {"step": 1, "trained": [[1, 101]]},
        {"dropped": [7, 107], "reason": "reward_timeout"},
        {"requeued": [[3, 103], [4, 104]], "reason": "replay_buffer"},
    ]


def test_a_resumed_run_goes_on_from_what_the_files_and_the_state_hold(tiny_config, make_recorder, tmp_path):
    recorder = make_recorder(tiny_config, tmp_path / "run")
    record_steps(recorder, [0.1, 0.2, 0.3])
    recorder.evaluated(evaluation(0, reward=0.25))
    state = json.loads(json.dumps(recorder.state()))
    recorder.run_dir.close()
    again = make_recorder(tiny_config, tmp_path / "run")
    again.restore(3, state)
    assert again.step == 3
    assert again.history.evaluations == recorder.history.evaluations
    assert again.wall_s > state["wall_s"] > 0
    summary = again.write_summary("completed")
    assert (summary["steps"], summary["reward_first"], summary["resumed_at"]) == (3, 0.1, [3])


def test_the_summary_tells_deaths_and_how_fast_all_was_well_again(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    recorder.failures.actor_recovered(recorder.failures.actor_died("trainer", ActorDied("trainer died: killed")))
    recorder.failures.actor_died("reward", ActorDied("reward died: killed"))
    record_steps(recorder, [0.5])
    summary = recorder.write_summary("completed")
    assert summary["restarts"] == {"trainer": 1, "reward": 1}
    assert [death["error"] for death in summary["recovery"]["deaths"]] == [
        "trainer died: killed",
        "reward died: killed",
    ]
    assert summary["recovery"]["back_s_max"] == summary["recovery"]["back_s_median"] > 0
    assert summary["recovery"]["next_step_s_max"] >= summary["recovery"]["next_step_s_median"] > 0


def test_groups_that_the_filter_drops_are_counted_and_measured_apart_from_those_trained_on(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    hand_out_tickets(recorder)
    for serial in (20, 21, 22):
        recorder.group_dropped(Ticket(serial), ZeroVarianceGroup(finished_group(serial, 1.0)))
    record_steps(recorder, [0.2, 0.2])
    first, second = lines(recorder)
    assert (first["rollout/zero_variance_dropped"], second["rollout/zero_variance_dropped"]) == (3, 0)
    assert (first["reward/mean"], second["reward/mean"]) == (0.2, 0.2)
    assert first["rollout/reward_mean"] == pytest.approx((3 * 1.0 + 0.2) / 4)
    assert first["rollout/shaped_reward_mean"] == pytest.approx((3 * 0.5 + 0.1) / 4)
    assert second["rollout/reward_mean"] == pytest.approx(0.2)
    ledger, samples = (recorder.run_dir.read(name) for name in ("ledger.jsonl", "rollouts.jsonl"))
    assert ledger[:3] == [{"dropped": [s, 100 + s], "reason": "zero_variance"} for s in (20, 21, 22)]
    assert [sample["prompt_serial"] for sample in samples] == [20, 22, 2]  # those that came with texts


class Payload(list):
    """A list that a weak reference can look at."""


@pytest.mark.parametrize("filtered", [False, True])
def test_only_numbers_of_a_group_are_kept_not_its_payload(tiny_config, make_recorder, filtered):
    recorder = make_recorder(tiny_config)
    hand_out_tickets(recorder)
    payload = Payload(["ab", "ba"])
    seen, rollout = weakref.ref(payload), finished_group(4, 1.0, completions=payload)
    if filtered:
        recorder.group_dropped(Ticket(4), ZeroVarianceGroup(rollout))
    else:
        recorder.group_finished(rollout)
    assert seen() is payload
    del payload, rollout
    assert seen() is None


def test_sinks_get_every_step_the_samples_and_what_came_out(tiny_config, make_recorder):
    class Sink:
        calls: ClassVar[list] = []

        def __getattr__(self, method):
            return lambda *args: self.calls.append((method, *args))

    recorder = make_recorder(tiny_config, make_sinks=partial(Sinks, {"mine": Sink}))
    record_steps(recorder, [0.25, 0.5])
    summary = recorder.write_summary("completed")
    recorder.sinks.close()
    assert summary["sinks"] == {"mine": {"errors": 0, "left_out": 0}}
    assert [(call[1], call[2]["reward/mean"]) for call in Sink.calls if call[0] == "scalars"] == [(1, 0.25), (2, 0.5)]
    assert [call[1:] for call in Sink.calls if call[0] == "histogram"][3:] == [
        (2, "batch/rewards", [0.5, 0.5]),
        (2, "batch/completion_tokens", [2, 4]),
        (2, "batch/policy_age", [1]),
    ]
    (text,) = [call for call in Sink.calls if call[0] == "text"]
    assert text[1:] == (
        1,
        "rollouts",
        [{"prompt": "ba>", "completion": answer, "reward": 0.5, "advantage": 0.0} for answer in ("ab", "ba")],
    )
    assert [call[0] for call in Sink.calls[-2:]] == ["summary", "close"]
    assert Sink.calls[-2][1]["status"] == "completed"


def test_deaths_are_told_at_once_on_the_clock_of_the_run(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config, wall_s_before=1000.0)
    death = recorder.failures.actor_died("trainer", ActorDied("trainer died: killed"))
    recorder.failures.actor_recovered(death)
    summary = recorder.write_summary("completed")
    recorder.restore(7, recorder.state())
    recorder.run_dir.close()
    died, back, resumed = recorder.run_dir.read("events.jsonl")
    assert (died["event"], died["actor"], died["error"]) == ("died", "trainer", "trainer died: killed")
    assert 1000.0 <= died["at_s"] <= back["at_s"] <= resumed["at_s"]
    assert back == {"event": "back", "at_s": back["at_s"], "actor": "trainer", "after_s": death.back_s}
    assert (resumed["event"], resumed["step"]) == ("resumed", 7)
    assert summary["recovery"]["deaths"][0]["at_s"] == pytest.approx(died["at_s"], abs=1e-3)


def test_the_timeline_of_a_resumed_run_goes_on_where_it_was(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config, wall_s_before=1000.0)
    now = time.perf_counter()
    timeline = recorder.timeline(most_mb=1.0)
    timeline.add(
        "driver", TelemetryBatch([Span("training", 0, "ticket", "wait", now, now + 1, False, {})], MetricSet(), now, 0)
    )
    timeline.close()
    recorder.run_dir.close()
    (event,) = [e for e in json.loads((recorder.run_dir.path / "timeline.json").read_text()) if e["ph"] == "X"]
    assert event["ts"] == pytest.approx(recorder.wall_s * 1e6, abs=60e6)


def test_lines_sinks_and_the_summary_carry_old_names_beside_the_new_ones(tiny_config, make_recorder, caplog):
    sent = []

    class Sink:
        def scalars(self, step, values):
            sent.append(values)

        def histogram(self, step, name, values): ...

        def summary(self, values): ...

        def close(self): ...

    caplog.set_level("INFO")
    recorder = make_recorder(tiny_config)
    recorder.sinks = Sinks({"sink": Sink}, print)
    recorder.training_begins([GeneratorStats(0.0, 0)])
    recorder.measured.record("generator/batch_size", 3.0)
    hand_out_tickets(recorder)
    trained = {"loss": 0.1, "policy_age/max": 0, "policy_age/mean": 0.0}
    trained |= {"mismatch/logprob_abs_diff": 0.25, "mismatch/age_2/kl_k1": 0.5}
    times = recorder.stopwatch()
    for name in ("time/trainer_wait_s", "time/train_step_s", "time/weight_sync_s", "time/weight_load_s"):
        with times(name):
            pass
    with recorder.metrics_line(TrainedStep(1, trained, batch_of(Ticket(1), 0.5), times), [GeneratorStats(0.1, 10)]):
        pass
    summary = recorder.write_summary("completed")
    recorder.sinks.close()
    (line,) = lines(recorder)
    assert sent == [line]
    assert (line["mismatch/behavior_abs"], line["mismatch/age_2/behavior_k1"]) == (0.25, 0.5)
    assert line["time/weights_live_s"] == line["time/weight_load_s"]
    assert line["generator/rows/mean"] == line["generator/batch_size/mean"] == 3.0
    assert line["rollout/outstanding"] == line["rollout/tickets_in_use"] == 30
    assert line["rollout/zero_advantage_dropped"] == line["recovery/groups_begun_again"] == 0
    assert summary["groups_begun_again"] == summary["groups_requeued"]
    notices = [record.message for record in caplog.records if "new names" in record.message]
    assert len(notices) == 1
    assert "rollout/outstanding -> rollout/tickets_in_use" in notices[0]
