import pytest

from grpo.config.warnings import warnings
from tests.composed import checked, composed


def test_more_rollouts_than_tickets_is_a_warning_that_says_how_many_can_run():
    (warning,) = warnings(composed("buffer.max_policy_age=0"))
    assert "only 16 rollouts can ever run" in warning


def test_filters_and_greedy_sampling_are_warned_about():
    found = warnings(composed("rollout.top_k=5", "rollout.temperature=0"))
    assert len(found) == 2


def test_algorithms_that_undo_each_other_are_warned_of():
    (warning,) = warnings(composed("filter=zero_variance", "shaping.length_penalty=0.1"))
    assert warning.startswith("filter.zero_variance: with shaping.length_penalty above 0")
    (warning,) = warnings(composed("loss.beta=0.1", "loss.kl_estimator=k1"))
    assert "take k2 or k3" in warning


@pytest.mark.parametrize("horizonless", ["loss.aggregation=fixed_horizon", "loss.name=dr_grpo"])
def test_a_fixed_horizon_that_is_not_given_is_warned_of(horizonless):
    (warning,) = warnings(composed(horizonless))
    assert warning.startswith("loss.horizon: without it")
    assert warnings(composed(horizonless, "loss.horizon=16")) == []
    assert warnings(composed("loss=dr_grpo")) == []
    assert warnings(composed("loss.name=dr_grpo", "loss.aggregation=token_mean")) == []


def test_evaluations_that_will_not_happen_are_warned_about():
    (warning,) = warnings(composed("eval.every=150"))
    assert "only the start and the end are evaluated" in warning
    (warning,) = warnings(composed("eval.every=10", "eval.prompts=0"))
    assert "nothing is evaluated" in warning


def test_ranks_that_would_have_nothing_to_do_are_warned_about():
    assert warnings(composed("trainer.ranks=16")) == []
    (warning,) = warnings(composed("trainer.ranks=16", "trainer.updates_per_batch=2"))
    assert warning.startswith("trainer.ranks=16: an update has 8 groups")


def test_math_verify_that_can_end_the_run_is_warned_about():
    (warning,) = warnings(composed("+reward.functions.math_verify=0.5"))
    assert "reward.on_error=drop" in warning
    assert warnings(composed("+reward.functions.math_verify=0.5", "reward.on_error=drop")) == []


def test_what_is_left_to_cpus_while_the_trainer_has_gpus_is_warned_about():
    on_gpus = ["trainer.num_gpus=1", "generator.num_gpus=1", "eval.every=10", "loss.beta=0.1"]
    assert warnings(composed(*on_gpus, "eval.num_gpus=1", "reference.num_gpus=0.5")) == []
    assert warnings(composed(*on_gpus, "eval.replicas=0", "lora=r16")) == []
    first, second = warnings(composed(*on_gpus))
    assert first.startswith("reference.num_gpus=0: it computes on CPUs while")
    assert second.startswith("eval.num_gpus=0: it computes on CPUs while")


def test_dropout_of_adapters_is_warned_of():
    assert "lora.dropout=0.1: the trainer computes" in " ".join(warnings(checked("lora=r16", "lora.dropout=0.1")))
    assert not any("lora" in warning for warning in warnings(checked("lora=r16", "lora.target_modules=[q_proj]")))


def test_settings_of_episodes_without_an_environment_are_warned_of():
    (warning,) = warnings(composed("environment.max_turns=3"))
    assert warning.startswith("environment: its settings have no effect, since grpo.tasks.sorting:Sorting")
    assert warnings(composed("task=guess", "environment.max_turns=3")) == []
