import pytest

from grpo.config.operation import RecoveryConfig
from grpo.errors import ActorDied, DataError, PayloadLost, RewardTimeout, ZeroVarianceGroup
from grpo.services.failures import Failures
from grpo.types import GenerationReport, Group, Rollout, Scores


@pytest.fixture
def failures():
    return Failures(RecoveryConfig(max_restarts=2, max_dropped_groups=1))


def test_a_spent_budget_ends_the_run_with_the_error_behind_it(failures):
    for actor in ("generator-0", "reward"):
        failures.actor_died(actor, ActorDied(f"{actor} died: killed"))
        failures.payload_lost(PayloadLost("its tokens are gone"))  # costs nothing on top
    last = ActorDied("generator-1 died: out of memory")
    with pytest.raises(
        ActorDied, match=r"generator-1 died: out of memory; no restarts left .recovery.max_restarts=2 "
    ) as caught:
        failures.actor_died("generator-1", last)
    assert caught.value.__cause__ is last
    assert failures.restarts == {"generator-0": 1, "reward": 1}


def test_a_trained_step_fills_the_budgets_up(failures):
    for _ in range(5):
        failures.actor_died("trainer", ActorDied("died"))
        failures.actor_died("reward", ActorDied("died"))
        failures.group_failed(RewardTimeout("slow"))
        failures.step_trained()
    assert failures.restarts == {"trainer": 5, "reward": 5}


def test_the_budgets_of_actors_and_of_data_are_apart(failures):
    failures.group_failed(RewardTimeout("slow"))
    with pytest.raises(
        DataError, match=r"slow; too many dropped groups \(recovery\.max_dropped_groups=1 between two train steps\)"
    ):
        failures.group_failed(RewardTimeout("slow"))
    failures.actor_died("reward", ActorDied("died"))


def test_a_death_is_remembered_with_the_times_until_all_was_well_again(failures):
    death = failures.actor_died("trainer", ActorDied("trainer died: killed"))
    assert (death.actor, death.error, death.back_s, death.next_step_s) == (
        "trainer",
        "trainer died: killed",
        None,
        None,
    )
    failures.actor_recovered(death)
    failures.step_trained()
    assert 0 <= death.back_s <= death.next_step_s
    before = death.next_step_s
    failures.step_trained()
    assert death.next_step_s == before


def group_filtered(*shaped_rewards):
    group = Group(None, (), None, (0.5,) * len(shaped_rewards), (0.0,) * len(shaped_rewards), oldest_version=0)
    report = GenerationReport(0, 0, (1,) * len(shaped_rewards), (False,) * len(shaped_rewards))
    return ZeroVarianceGroup(Rollout(group, Scores(group.rewards, {}, ()), report, shaped_rewards))


def test_one_group_more_than_the_limit_ends_the_run_and_says_what_was_seen(failures):
    for rewards in [(0.0, 0.0)] * 3 + [(1.0, 1.0)] * 2 + [(0.0, 1.0)]:  # all of the last are masked
        failures.group_filtered(group_filtered(*rewards), limit=6)
    with pytest.raises(DataError) as caught:
        failures.group_filtered(group_filtered(0.25, 0.25), limit=6)
    message = str(caught.value)
    assert message.startswith(
        "filter.zero_variance: dropped 7 zero-variance groups before a batch was full (3 with reward 0 throughout, "
        "2 with reward 1 throughout, 1 with reward 0.25 throughout); "
    )
    assert "raise filter.max_dropped_batches" in message
    assert "\n" not in message


def test_every_batch_that_passes_the_filter_fills_up_what_may_be_dropped(failures):
    for _ in range(10):
        for _ in range(2):
            failures.group_filtered(group_filtered(1.0, 1.0), limit=2)
        for _ in range(3):
            failures.group_kept(batch=3)
    for _ in range(2):
        failures.group_filtered(group_filtered(0.0, 0.0), limit=2)
        failures.group_kept(batch=3)  # not a batch yet
    with pytest.raises(DataError, match="dropped 3 zero-variance groups"):
        failures.group_filtered(group_filtered(0.0, 0.0), limit=2)


def test_the_end_for_want_of_something_to_learn_is_said_once(failures):
    """Other rollouts drop one more each before they are cancelled."""
    failures.group_filtered(group_filtered(1.0, 1.0), limit=1)
    with pytest.raises(DataError):
        failures.group_filtered(group_filtered(1.0, 1.0), limit=1)
    failures.group_filtered(group_filtered(1.0, 1.0), limit=1)


def test_groups_with_nothing_to_learn_from_cost_no_other_budget(failures):
    for _ in range(50):
        failures.group_filtered(group_filtered(1.0, 1.0), limit=50)
    failures.group_failed(RewardTimeout("slow"))
