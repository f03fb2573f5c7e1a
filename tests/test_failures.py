import pytest

from grpo.config import RecoveryConfig
from grpo.failures import Failures
from grpo.types import ActorDied, DataError, PayloadLost, RewardTimeout


@pytest.fixture
def failures():
    return Failures(RecoveryConfig(max_restarts=2, max_data_failures=1))


def test_a_spent_budget_ends_the_run_with_the_error_behind_it(failures):
    for actor in ("generator-0", "reward"):
        failures.actor_died(actor, ActorDied(f"{actor} died: killed"))
        failures.payload_lost(PayloadLost("its tokens are gone"))  # costs nothing on top
    last = ActorDied("generator-1 died: out of memory")
    with pytest.raises(ActorDied, match=r"generator-1 died: out of memory; recovery.max_restarts=2 .* spent") as caught:
        failures.actor_died("generator-1", last)
    assert caught.value.__cause__ is last
    assert failures.restarts == {"generator-0": 1, "reward": 1}


def test_a_trained_step_fills_the_budgets_up(failures):
    for _ in range(5):
        failures.actor_died("trainer", ActorDied("died"))
        failures.actor_died("reward", ActorDied("died"))
        failures.reward_failed(RewardTimeout("slow"))
        failures.step_trained()
    assert failures.restarts == {"trainer": 5, "reward": 5}


def test_the_budgets_of_actors_and_of_data_are_apart(failures):
    failures.reward_failed(RewardTimeout("slow"))
    with pytest.raises(DataError, match=r"slow; recovery\.max_data_failures=1"):
        failures.reward_failed(RewardTimeout("slow"))
    failures.actor_died("reward", ActorDied("died"))


def test_a_death_is_remembered_with_the_times_until_all_was_well_again(failures):
    death = failures.actor_died("trainer", ActorDied("trainer died: killed"))
    assert (death.actor, death.error, death.back_s, death.next_step_s) == (
        "trainer",
        "trainer died: killed",
        None,
        None,
    )
    failures.actor_is_back(death)
    failures.step_trained()
    assert 0 <= death.back_s <= death.next_step_s
    before = death.next_step_s
    failures.step_trained()
    assert death.next_step_s == before
