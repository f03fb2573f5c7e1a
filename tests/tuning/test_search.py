"""Which settings are tried, and which one is named."""

import pytest

from grpo.tuning.search import Outcome, Setting, search


class Measured:
    """Runs in which the trainer waits for as long as `wait(age, concurrency)` says; counts them."""

    def __init__(self, wait):
        self._wait, self.tried = wait, []

    def __call__(self, setting):
        self.tried.append(setting)
        return Outcome(1.0, self._wait(setting.max_policy_age, setting.concurrency), 0.5, 0.0)


def enough(age_needed, concurrency_needed):
    return lambda age, concurrency: 0.05 if age >= age_needed and concurrency >= concurrency_needed else 0.5


@pytest.mark.parametrize("age", [0, 1, 2])
@pytest.mark.parametrize("concurrency", [1, 2, 9, 15, 16])
def test_the_smallest_age_and_then_the_smallest_concurrency_that_are_enough(age, concurrency):
    measured = Measured(enough(age, concurrency))
    found = search(measured, groups_per_step=16, ages=(0, 1, 2), target=0.1)
    assert found.enough
    assert found.setting.max_policy_age == age
    assert concurrency <= found.setting.concurrency <= max(concurrency, 1.15 * concurrency)
    assert found.outcome.trainer_wait == 0.05


def test_no_setting_is_measured_twice_and_few_are():
    measured = Measured(enough(1, 19))
    search(measured, groups_per_step=64, ages=(0, 1, 2), target=0.1)
    assert len(measured.tried) == len(set(measured.tried)) <= 10


def test_where_none_is_enough_the_best_is_named():
    found = search(Measured(lambda age, concurrency: 0.6 - 0.1 * age), 16, (0, 1, 2), 0.1)
    assert not found.enough
    assert found.setting == Setting(2, 48)
    assert found.outcome.trainer_wait == pytest.approx(0.4)


def test_a_setting_is_what_one_types():
    assert str(Setting(max_policy_age=1, concurrency=9)) == "rollout.concurrency=9 buffer.max_policy_age=1"
