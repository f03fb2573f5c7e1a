import pytest

from grpo.observe.metrics import FinishedGroups, GeneratorRates
from grpo.types import GenerationReport, GeneratorStats, Group, Problem, Prompt, Rollout, Scores


def test_rates_are_those_since_the_last_call_over_all_generators():
    rates = GeneratorRates([GeneratorStats(1.0, 100, "a"), GeneratorStats(3.0, 300, "b")], now_s=10.0)
    first = rates.take([GeneratorStats(2.0, 140, "a"), GeneratorStats(4.0, 400, "b")], now_s=14.0)
    assert first == {"generator/busy_fraction": 0.25, "generator/replicas": 2, "generator/tokens_per_s": 35.0}
    second = rates.take([GeneratorStats(4.0, 150, "a"), GeneratorStats(4.0, 400, "b")], now_s=16.0)
    assert second == {"generator/busy_fraction": 0.5, "generator/replicas": 2, "generator/tokens_per_s": 5.0}


def test_a_generator_that_replaces_another_counts_from_zero():
    rates = GeneratorRates([GeneratorStats(50.0, 50_000, "old"), GeneratorStats(10.0, 9_000, "other")], now_s=0.0)
    found = rates.take([GeneratorStats(0.5, 70, "new"), GeneratorStats(10.5, 9_030, "other")], now_s=1.0)
    assert found == {"generator/busy_fraction": 0.5, "generator/replicas": 2, "generator/tokens_per_s": 100.0}


def test_no_generator_is_busy_for_longer_than_there_was_time():
    """Its counter may have been read a little later than the clock."""
    rates = GeneratorRates([GeneratorStats(0.0, 0)], now_s=0.0)
    assert rates.take([GeneratorStats(1.01, 10)], now_s=1.0)["generator/busy_fraction"] == 1.0


def rollout(reward, lengths, truncated):
    group = Group(Prompt(0, Problem("ba>", "ab"), None), (), None, (reward, reward), (0.0, 0.0), oldest_version=0)
    scores = Scores((reward, reward), {}, ())
    return Rollout(group, scores, GenerationReport(0, 0, lengths, truncated), shaped_rewards=(reward / 2, reward / 2))


def test_groups_that_finished_are_measured_once_those_filtered_too():
    groups = FinishedGroups()
    groups.add(rollout(1.0, (2, 4), (False, True)), filtered=True)
    groups.add(rollout(0.5, (1, 5), (False, False)), filtered=False)
    assert groups.take() == pytest.approx(
        {
            "rollout/zero_variance_dropped": 1,
            "rollout/reward_mean": 0.75,
            "rollout/shaped_reward_mean": 0.375,
            "generator/completion_tokens_mean": 3.0,
            "generator/truncated_fraction": 0.25,
        }
    )
    assert groups.take() == {"rollout/zero_variance_dropped": 0}
