import pytest

from grpo.cluster.plan import actor_specs, check_capacity
from grpo.types import LaunchError


def test_the_reference_exists_only_with_a_kl_term(tiny_config):
    assert "reference" not in [spec.name for spec in actor_specs(tiny_config)]
    tiny_config.loss.beta = 0.1
    assert "reference" in [spec.name for spec in actor_specs(tiny_config)]


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
