"""Whatever ends a run of `scripts/train.py`: no process of it stays alive, and nobody else's is ended."""

import json
import os
import signal
import tempfile
import time

import pytest

from tests.ray_nodes import ENVIRONMENT, JoinedNode, RayNodes, members
from tests.scripts.processes import finish, processes_of

pytestmark = pytest.mark.long

ENDLESS = "trainer.max_steps=100000"


def in_mid_run(process):
    assert any(line.startswith("step") for line in process.stdout)


def once_it_runs(process, command):
    """Wait until a program that it starts is there."""
    while not any(command in running for running in members(process.pid).values()):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def joined():
    """Asks for a token, as Ray likes."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = RayNodes(folder)
        try:
            yield JoinedNode(nodes.address, nodes.start(cpus=2))
        finally:
            nodes.close()


def test_a_driver_killed_while_ray_starts_leaves_no_process(train):
    process = train(ENDLESS)
    once_it_runs(process, "raylet/raylet")
    process.kill()
    process.communicate()
    assert processes_of(process.pid) == []


def test_sigterm_while_ray_starts_is_an_interruption_and_leaves_no_process(train):
    process = train(ENDLESS)
    once_it_runs(process, "gcs_server")
    process.terminate()
    code, stdout, _ = finish(process)
    assert code == 130
    assert "interrupted after 0 steps" in stdout
    assert processes_of(process.pid) == []


def check_that_ending_it_leaves_a_joined_cluster_as_it_was(train, joined, number):
    process = train(ENDLESS, f"cluster.address={joined.address}")
    in_mid_run(process)
    assert any(command.startswith("ray::") for command in joined.guests().values())
    process.send_signal(number)
    finish(process)
    assert joined.guests_after_a_while() == {}
    assert joined.is_whole()


def test_a_killed_driver_leaves_a_joined_cluster_as_it_was(train, joined):
    check_that_ending_it_leaves_a_joined_cluster_as_it_was(train, joined, signal.SIGKILL)


def test_a_killed_driver_leaves_nothing_of_its_cluster_and_ctrl_c_ends_another_run_in_order(train, tmp_path):
    """The one that is not killed is not disturbed; its end takes all of its actors."""
    survivor, victim = (train(ENDLESS, f"hydra.run.dir={name}") for name in ("survivor", "victim"))
    in_mid_run(victim)
    in_mid_run(survivor)
    assert len(members(victim.pid)) > 5  # the actors among them
    victim.kill()
    victim.communicate()
    assert processes_of(victim.pid) == []
    os.killpg(survivor.pid, signal.SIGINT)  # as a terminal does: to everybody at once
    code, stdout, stderr = finish(survivor)
    assert (code, stderr) == (130, "")
    assert "stopping after this step" in stdout
    summary = json.loads((tmp_path / "survivor/summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 1
    assert processes_of(survivor.pid) == []
