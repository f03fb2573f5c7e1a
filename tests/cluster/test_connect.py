"""What is found at the address of a cluster, and what is said where it can't be joined."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from grpo.actors.specs import ActorSpec
from grpo.cluster import probe
from grpo.cluster.connect import nodes_at, wait_for_room
from grpo.cluster.placement import Node
from grpo.errors import LaunchError
from tests.ray_nodes import ENVIRONMENT, members


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Have this process use a mode and a token of Ray's, and none of those that this machine may have."""

    def use(environment):
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return use


def refused(address):
    with pytest.raises(LaunchError) as caught:
        nodes_at(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def alarmed_while_it_looks_for_processes(address):
    """Whether the probe could end for a machine with many processes, as if no Ray had answered."""
    program = """if True:
        import signal, sys
        from ray._private import services
        from grpo.cluster.probe import probe
        find = services.find_node_ids
        services.find_node_ids = lambda: (print(signal.alarm(0)), find())[1]
        probe(sys.argv[1])
    """
    done = subprocess.run([sys.executable, "-c", program, address], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_cluster_is_looked_at_and_asks_for_its_token(nodes, use):
    head = nodes.start(cpus=2)
    use(ENVIRONMENT)
    assert nodes_at(nodes.address) == [Node(2.0, 0.0)]
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc"]  # a machine on which no node runs
    if subprocess.run([*elsewhere, "true"], capture_output=True).returncode == 0:
        seen = subprocess.run([*elsewhere, sys.executable, probe.__file__, nodes.address], capture_output=True)
        assert "runs on this machine, and a run's driver needs one: `ray start" in json.loads(seen.stdout)["error"]
    assert not alarmed_while_it_looks_for_processes(nodes.address)
    use({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64})
    assert f"{nodes.address} requires another token than the one set here: export" in refused(nodes.address)
    use({"RAY_AUTH_MODE": "token"})
    assert "requires a token, and none is set here: export RAY_AUTH_MODE=token RAY" in refused(nodes.address)
    use({})
    assert "requires a token, and token authentication is off here: export RAY_AUTH" in refused(nodes.address)
    use(ENVIRONMENT)
    (gcs,) = (process for process, command in members(head).items() if "gcs_server" in command)
    os.kill(gcs, signal.SIGSTOP)
    assert f"something listens at {nodes.address}, but no Ray of this version answers" in refused(nodes.address)
    nodes.kill(head)
    assert f"no Ray cluster at {nodes.address}: Connection refused" in refused(nodes.address)


def test_where_there_is_no_cluster_the_answer_is_one_line(use):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use({"RAY_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}"})  # without it `auto` is any cluster of this machine
        assert "no Ray cluster at auto: Connection refused; `ray start --head` starts one" in refused("auto")
    assert "can't reach Ray at nowhere.invalid:6379: " in refused("nowhere.invalid:6379")


def test_a_node_that_is_late_is_waited_for_as_long_as_the_config_says(nodes, use):
    three = [ActorSpec("reward", object, replicas=3, num_cpus=1)]
    nodes.start(cpus=1)
    use(ENVIRONMENT)
    told = []

    def warn(line):
        told.append(line)
        nodes.start(cpus=2)

    with pytest.raises(LaunchError, match=r"^reward\.num_cpus: .* ask for 3 CPUs .* the Ray cluster has 1;"):
        wait_for_room(three, nodes.address, 0, warn)
    assert not told
    wait_for_room(three, nodes.address, 60, warn)
    (line,) = told
    assert line.startswith("waiting up to 60 s for the Ray cluster (cluster.wait_for_nodes_s): reward.num_cpus: the ")
