import pytest

from grpo.actors.generator import Generator
from grpo.actors.specs import actor_specs, evaluation_specs


def test_the_reference_exists_only_with_a_kl_term(tiny_config):
    assert "reference" not in [spec.name for spec in actor_specs(tiny_config)]
    tiny_config.loss.beta = 0.1
    assert "reference" in [spec.name for spec in actor_specs(tiny_config)]


def test_a_trainer_of_adapters_is_its_own_reference(tiny_config):
    tiny_config.loss.beta, tiny_config.lora.rank = 0.1, 4
    assert "reference" not in [spec.name for spec in actor_specs(tiny_config)]


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


def test_evaluating_a_model_needs_no_trainer(tiny_config):
    tiny_config.loss.beta = 0.1
    assert [spec.name for spec in evaluation_specs(tiny_config)] == ["dataloader", "generator", "reward"]


def test_an_actor_with_a_gpu_computes_on_it(tiny_config):
    tiny_config.trainer.num_gpus = 1
    devices = {spec.name: spec.kwargs.get("device") for spec in actor_specs(tiny_config)}
    assert devices["trainer"] == "cuda"
    assert devices["generator"] == "cpu"


def test_every_rank_of_the_trainer_is_a_process(tiny_config):
    tiny_config.trainer.ranks = 3
    processes = {spec.name: spec.processes for spec in actor_specs(tiny_config)}
    assert (processes["trainer"], processes["generator"]) == (3, 1)


def test_threads_follow_the_cpus_unless_set(tiny_config):
    tiny_config.generator.num_cpus = 3
    tiny_config.trainer.threads = 5
    threads = {spec.name: spec.kwargs.get("threads") for spec in actor_specs(tiny_config)}
    assert (threads["generator"], threads["trainer"]) == (3, 5)
