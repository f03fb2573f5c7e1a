"""Room on the nodes of a cluster: by calculation, and for ranks on real Ray."""

import json
import os
import subprocess
import sys

import pytest

from grpo.actors.specs import ActorSpec, actor_specs
from grpo.cluster.placement import Node, check_placement, nodes_for_all_ranks
from grpo.errors import LaunchError
from tests.ray_nodes import ENVIRONMENT, ROOT


def spec(name, replicas, cpus, gpus=0.0, ranks=1):
    return ActorSpec(name, object, {}, replicas, cpus, gpus, ranks=ranks)


def test_an_evaluator_that_asks_for_too_much_is_named_by_its_key(tiny_config):
    tiny_config.eval.prompts, tiny_config.eval.every, tiny_config.eval.num_cpus = 8, 5, 4
    with pytest.raises(LaunchError, match=r"^eval.num_cpus: .*evaluator 4.*; lower eval.num_cpus$"):
        check_placement(actor_specs(tiny_config), [Node(2, 0)], "it")


def test_more_cpus_than_there_are_is_refused(tiny_config):
    tiny_config.generator.replicas = 4
    specs = actor_specs(tiny_config)
    check_placement(specs, [Node(5, 0)], "it")
    message = r"the actors ask for 5 CPUs \(generator 4, trainer 1\) but it has 3; set generator.replicas=2$"
    with pytest.raises(LaunchError, match=message):
        check_placement(specs, [Node(1, 0), Node(2, 0)], "it")


def test_more_gpus_than_there_are_is_refused(tiny_config):
    tiny_config.trainer.num_gpus = 2
    with pytest.raises(LaunchError, match=r"trainer.num_gpus: the actors ask for 2 GPUs .*; lower trainer.num_gpus$"):
        check_placement(actor_specs(tiny_config), [Node(64, 1)], "this machine")


def test_without_any_gpu_the_message_says_how_to_do_without(tiny_config):
    tiny_config.generator.replicas = 2
    tiny_config.generator.num_gpus = tiny_config.trainer.num_gpus = 1
    message = (
        r"generator.num_gpus: the actors ask for 3 GPUs \(generator 2, trainer 1\) but this machine has 0; .*"
        r"\+experiment=gsm8k_cpu or set generator.engine=torch generator.num_gpus=0 trainer.num_gpus=0$"
    )
    with pytest.raises(LaunchError, match=message):
        check_placement(actor_specs(tiny_config), [Node(1, 0)], "this machine")


def test_a_process_that_is_too_large_for_every_node_is_named_with_what_they_have():
    nodes = [Node(16, 2), Node(16, 2), Node(64, 0)]
    message = (
        r"^generator.num_gpus: one process needs 8 CPUs and 4 GPUs on one node, and no node of the cluster has them "
        r"\(2 with 16 CPUs and 2 GPUs, 1 with 64 CPUs and 0 GPUs\); lower generator.num_cpus or generator.num_gpus$"
    )
    with pytest.raises(LaunchError, match=message):
        check_placement([spec("generator", 1, 8, 4)], nodes, "the cluster")


def test_what_fits_in_all_but_not_on_the_nodes_comes_with_a_number_that_fits():
    nodes = [Node(16, 3), Node(16, 3)]
    check_placement([spec("trainer", 1, 8, 1), spec("generator", 2, 4, 2)], nodes, "the cluster")
    message = r"^generator.num_gpus: .* not every generator finds 4 CPUs and 2 GPUs together; set generator.replicas=2$"
    with pytest.raises(LaunchError, match=message):
        check_placement([spec("generator", 3, 4, 2)], nodes, "the cluster")


def test_gpus_without_cpus_beside_them_are_no_room():
    nodes = [Node(2, 8), Node(62, 0)]
    with pytest.raises(LaunchError, match=r"not every generator .*; set generator.replicas=2$"):
        check_placement([spec("generator", 8, 1, 1)], nodes, "the cluster")


def test_shares_of_a_gpu_have_to_lie_on_one():
    check_placement([spec("trainer", 1, 1, 0.5), spec("generator", 1, 1, 0.5)], [Node(4, 1)], "it")
    with pytest.raises(LaunchError, match=r"not every trainer finds 1 CPUs and 0.4 GPUs together"):
        check_placement([spec("trainer", 1, 1, 0.4), spec("generator", 2, 1, 0.8)], [Node(8, 2)], "it")


def test_ranks_are_counted_and_named(tiny_config):
    tiny_config.trainer.ranks = 2
    message = r"^trainer.num_cpus: .* 3 CPUs \(generator 1, trainer 2\) but it has 2; set trainer.ranks=1$"
    with pytest.raises(LaunchError, match=message):
        check_placement(actor_specs(tiny_config), [Node(2, 0)], "it")
    check_placement(actor_specs(tiny_config), [Node(2, 0), Node(1, 0)], "it")


def test_ranks_may_lie_on_several_nodes_and_come_with_a_number_that_fits():
    nodes = [Node(16, 3), Node(16, 3)]
    check_placement([spec("trainer", 1, 4, 1, ranks=6)], nodes, "the cluster")
    with pytest.raises(LaunchError, match=r"not every trainer finds 8 CPUs and 1 GPUs together; set trainer.ranks=4$"):
        check_placement([spec("trainer", 1, 8, 1, ranks=5)], [*nodes, Node(8, 0)], "the cluster")


def test_one_process_that_finds_no_room_beside_the_others_has_to_ask_for_less():
    with pytest.raises(LaunchError, match=r"^trainer.num_cpus: .*not every trainer .*; ask for less in each process$"):
        check_placement([spec("generator", 1, 3), spec("trainer", 1, 2)], [Node(4, 0), Node(1, 0)], "it")


def test_all_ranks_get_a_node_on_which_they_are_in_nobodys_way():
    ranks, nodes = spec("trainer", 1, 1, 1, ranks=2), [Node(8, 1), Node(2, 2), Node(8, 4), Node(8, 4)]
    assert nodes_for_all_ranks(ranks, [ranks], nodes) == [1, 2, 3]
    assert nodes_for_all_ranks(ranks, [spec("generator", 1, 4, 4), ranks], nodes) == [1, 2, 3]
    assert nodes_for_all_ranks(ranks, [spec("generator", 2, 4, 4), ranks], nodes) == [1]
    assert nodes_for_all_ranks(ranks, [spec("generator", 2, 4, 4), spec("evaluator", 1, 1, 2), ranks], nodes) == []


def test_ranks_share_a_node_where_one_has_room_for_all(nodes):
    for _ in range(2):
        nodes.start(cpus=2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.placed_ranks", nodes.address],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["beside generators"]) == len(found["others hold room"]) == 2
    assert len(set(found["beside generators"])) == 1
    assert len(set(found["others hold room"])) == 2
