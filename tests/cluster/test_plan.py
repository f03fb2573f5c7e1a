import pytest

from grpo.actors.generator import Generator
from grpo.cluster.plan import actor_specs, check_capacity, evaluation_specs
from grpo.types import LaunchError


def test_the_reference_exists_only_with_a_kl_term(tiny_config):
    assert "reference" not in [spec.name for spec in actor_specs(tiny_config)]
    tiny_config.loss.beta = 0.1
    assert "reference" in [spec.name for spec in actor_specs(tiny_config)]


@pytest.mark.parametrize(
    ("prompts", "every", "replicas", "there"), [(8, 5, 2, True), (0, 5, 2, False), (8, 0, 2, False), (8, 5, 0, False)]
)
def test_an_evaluator_exists_only_where_evaluations_run_beside_the_training(
    tiny_config, prompts, every, replicas, there
):
    tiny_config.eval.prompts, tiny_config.eval.every, tiny_config.eval.replicas = prompts, every, replicas
    tiny_config.eval.num_cpus, tiny_config.eval.threads = 2, 3
    evaluators = [spec for spec in actor_specs(tiny_config) if spec.name == "evaluator"]
    assert [(spec.cls, spec.replicas, spec.num_cpus, spec.kwargs["threads"]) for spec in evaluators] == [
        (Generator, 2, 2, 3)
    ] * there


def test_an_evaluator_that_asks_for_too_much_is_named_by_its_key(tiny_config):
    tiny_config.eval.prompts, tiny_config.eval.every, tiny_config.eval.num_cpus = 8, 5, 4
    with pytest.raises(LaunchError, match=r"^eval.num_cpus: .*evaluator 4.*; lower eval.num_cpus$"):
        check_capacity(actor_specs(tiny_config), cpus=2, gpus=0, where="it")


def test_evaluating_a_model_needs_no_trainer(tiny_config):
    tiny_config.loss.beta = 0.1
    assert [spec.name for spec in evaluation_specs(tiny_config)] == ["dataloader", "generator", "reward"]


def test_an_actor_with_a_gpu_computes_on_it(tiny_config):
    tiny_config.trainer.num_gpus = 1
    devices = {spec.name: spec.kwargs.get("device") for spec in actor_specs(tiny_config)}
    assert devices["trainer"] == "cuda"
    assert devices["generator"] == "cpu"


def test_threads_follow_the_cpus_unless_set(tiny_config):
    tiny_config.generator.num_cpus = 3
    tiny_config.trainer.threads = 5
    threads = {spec.name: spec.kwargs.get("threads") for spec in actor_specs(tiny_config)}
    assert (threads["generator"], threads["trainer"]) == (3, 5)


def test_more_cpus_than_there_are_is_refused(tiny_config):
    tiny_config.generator.replicas = 4
    specs = actor_specs(tiny_config)
    check_capacity(specs, cpus=5, gpus=0, where="it")
    message = (
        r"generator.num_cpus: the actors ask for 5 CPUs \(generator 4, trainer 1\) but it has 3; .*generator.replicas"
    )
    with pytest.raises(LaunchError, match=message):
        check_capacity(specs, cpus=3, gpus=0, where="it")


def test_more_gpus_than_there_are_is_refused(tiny_config):
    tiny_config.trainer.num_gpus = 2
    with pytest.raises(LaunchError, match=r"trainer.num_gpus: the actors ask for 2 GPUs .*; lower trainer.num_gpus$"):
        check_capacity(actor_specs(tiny_config), 64, 1, "this machine")


def test_without_any_gpu_the_message_says_how_to_do_without(tiny_config):
    tiny_config.generator.replicas = 2
    tiny_config.generator.num_gpus = tiny_config.trainer.num_gpus = 1
    message = (
        r"generator.num_gpus: the actors ask for 3 GPUs \(generator 2, trainer 1\) but this machine has 0; .*"
        r"\+experiment=gsm8k_cpu or set generator.engine=torch generator.num_gpus=0 trainer.num_gpus=0$"
    )
    with pytest.raises(LaunchError, match=message):
        check_capacity(actor_specs(tiny_config), 1, 0, "this machine")
