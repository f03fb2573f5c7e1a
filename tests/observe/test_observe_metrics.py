"""Numbers of a step and of a run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.observe.metrics import (
    FinishedGroups,
    GeneratorRates,
    History,
    Startup,
    episode_metrics,
    process_age_s,
    recovery_of,
)
from grpo.services.failures import Death
from grpo.types import (
    EpisodeReport,
    EvaluationReport,
    GenerationReport,
    GeneratorStats,
    Group,
    Problem,
    Prompt,
    Rollout,
    Scores,
)

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_rates_are_those_since_the_last_call_over_all_generators():
    rates = GeneratorRates([GeneratorStats(1.0, 100, "a"), GeneratorStats(3.0, 300, "b")], now_s=10.0)
    first = rates.update([GeneratorStats(2.0, 140, "a"), GeneratorStats(4.0, 400, "b")], now_s=14.0)
    assert first == {"generator/busy_fraction": 0.25, "generator/replicas": 2, "generator/tokens_per_s": 35.0}
    second = rates.update([GeneratorStats(4.0, 150, "a"), GeneratorStats(4.0, 400, "b")], now_s=16.0)
    assert second == {"generator/busy_fraction": 0.5, "generator/replicas": 2, "generator/tokens_per_s": 5.0}


def test_a_generator_that_replaces_another_counts_from_zero():
    rates = GeneratorRates([GeneratorStats(50.0, 50_000, "old"), GeneratorStats(10.0, 9_000, "other")], now_s=0.0)
    found = rates.update([GeneratorStats(0.5, 70, "new"), GeneratorStats(10.5, 9_030, "other")], now_s=1.0)
    assert found == {"generator/busy_fraction": 0.5, "generator/replicas": 2, "generator/tokens_per_s": 100.0}


def test_no_generator_is_busy_for_longer_than_there_was_time():
    """Its counter may have been read a little later than the clock."""
    rates = GeneratorRates([GeneratorStats(0.0, 0)], now_s=0.0)
    assert rates.update([GeneratorStats(1.01, 10)], now_s=1.0)["generator/busy_fraction"] == 1.0


def rollout(reward, lengths, truncated):
    group = Group(Prompt(0, Problem("ba>", "ab"), None), (), None, (reward, reward), (0.0, 0.0), oldest_version=0)
    scores = Scores((reward, reward), {}, ())
    return Rollout(group, scores, GenerationReport(0, 0, lengths, truncated), shaped_rewards=(reward / 2, reward / 2))


def test_groups_that_finished_are_measured_once_those_filtered_too():
    groups = FinishedGroups()
    groups.add(rollout(1.0, (2, 4), (False, True)), filtered=True)
    groups.add(rollout(0.5, (1, 5), (False, False)), filtered=False)
    assert groups.drain() == pytest.approx(
        {
            "rollout/zero_variance_dropped": 1,
            "rollout/reward_mean": 0.75,
            "rollout/shaped_reward_mean": 0.375,
            "generator/completion_tokens_mean": 3.0,
            "generator/truncated_fraction": 0.25,
        }
    )
    assert groups.drain() == {"rollout/zero_variance_dropped": 0}


def episode(ended_by="done", **others):
    return EpisodeReport(turns=2, given=3, ended_by=ended_by, environment_s=0.5, generator_s=2.0, **others)


def test_numbers_of_episodes_are_means_over_all_that_finished():
    groups = FinishedGroups()
    for episodes in ((episode(), episode("turns")), (episode("tokens"), episode("turns"))):
        each = rollout(1.0, (2, 4), (False, True))
        groups.add(replace(each, report=replace(each.report, episodes=episodes)), filtered=False)
    found = {name: value for name, value in groups.drain().items() if name.startswith("episode/")}
    assert found == {
        "episode/turns": 2.0,
        "episode/given_tokens": 3.0,
        "episode/environment_s": 0.5,
        "episode/generator_s": 2.0,
        "episode/ended_by_tokens": 0.25,
        "episode/ended_by_timeout": 0.0,
        "episode/ended_by_turns": 0.5,
    }
    assert "episode/turns" not in groups.drain()


def test_what_an_environment_does_not_report_counts_as_zero():
    reported = [episode(metrics={"tool_calls": 3.0}), episode(metrics={"tool_calls": 1.0, "moves": 2.0}), episode()]
    found = episode_metrics(reported)
    assert found["episode/tool_calls"] == pytest.approx(4 / 3)
    assert found["episode/moves"] == pytest.approx(2 / 3)
    assert episode_metrics([]) == {}


def test_every_number_of_an_episode_has_a_row_in_the_documentation():
    documented = set(re.findall(r"^\| `(episode/.+?)`", METRICS.read_text(), re.MULTILINE))
    written = {re.sub("ended_by_.+", "ended_by_<limit>", name) for name in episode_metrics([episode()])}
    assert documented == written | {"episode/tool_calls", "episode/tool_errors", "episode/<name>"}


def test_stages_follow_one_another_from_the_begin_of_the_process(monkeypatch):
    ages = iter((3.0, 3.5, 6.0))
    monkeypatch.setattr("grpo.observe.metrics.process_age_s", lambda: next(ages))
    startup = Startup()
    for stage in ("imports", "checks", "ray", "ray"):
        startup.ended(stage)
    assert startup.seconds == {"imports": 3.0, "checks": 0.5, "ray": 2.5}


def test_a_process_gets_older():
    assert 0 < process_age_s() <= process_age_s() < 24 * 3600


def line(step):
    return {
        "step": step, "loss": 1.0, "reward/mean": step / 20, "policy_age/max": step % 3, "time/step_s": 2.0,
        "time/trainer_wait_s": 0.5, "time/weight_sync_s": step / 10, "generator/busy_fraction": 0.75,
    }  # fmt: skip


def evaluation(step, reward, stderr=0.1):
    return EvaluationReport(step, 4, 0, reward, stderr, {1: 0.5}, 4, 40, 1, seconds=2.0)


def history_of(steps):
    history = History()
    for step in steps:
        history.add_step(line(step))
    return history


def test_totals_are_means_over_the_steps_and_over_their_first_and_last_tenth():
    totals = history_of(range(1, 21)).totals()
    assert (totals["reward_first"], totals["reward_last"]) == (pytest.approx(0.075), pytest.approx(0.975))
    assert (totals["max_policy_age_seen"], totals["trainer_wait_fraction"]) == (2, 0.25)
    assert totals["weight_sync_s_mean"] == pytest.approx(1.05)


def test_of_no_step_nothing_is_said():
    totals = History().totals()
    for name in ("reward_first", "eval_last", "max_policy_age_seen", "trainer_wait_fraction", "weight_sync_s_mean"):
        assert totals[name] is None


def test_what_is_restored_says_what_was_said_of_the_steps_until_then():
    history = history_of(range(1, 6))
    history.add_evaluation(evaluation(0, 0.25))
    history.add_evaluation(evaluation(5, 0.5, stderr=float("nan")))
    again = History()
    state = json.loads(json.dumps(history.state(5)).replace("NaN", "null"))
    again.restore(5, state, map(line, range(1, 9)))
    expected = history.totals() | {"resumed_at": [5]}
    assert json.dumps(again.totals()) == json.dumps(expected)


def test_an_evaluation_that_still_runs_at_a_checkpoint_is_skipped_by_a_resumed_run_unless_it_can_be_made_again():
    history = history_of([1, 2])
    history.evaluating = 2
    assert history.state(2)["evaluations_skipped"] == 0  # its step is the checkpoint's
    assert history.state(3)["evaluations_skipped"] == 1
    history.add_evaluation(evaluation(2, 0.25))
    assert history.state(3)["evaluations_skipped"] == 0


def test_deaths_are_told_on_the_clock_of_the_run_with_the_times_that_are_known():
    deaths = [Death("trainer", "killed", at=3.0, back_s=2.0, next_step_s=6.0), Death("reward", "killed", at=5.0)]
    told = recovery_of(deaths, run_s=lambda at: 100 + at)
    assert [(death["actor"], death["at_s"], death["back_s"]) for death in told["deaths"]] == [
        ("trainer", 103.0, 2.0), ("reward", 105.0, None),
    ]  # fmt: skip
    assert (told["back_s_median"], told["next_step_s_max"]) == (2.0, 6.0)
    assert recovery_of([], run_s=float) == {"deaths": []}
