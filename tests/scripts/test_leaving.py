"""Whatever ends a run of `scripts/train.py`: no process of it stays alive, and nobody else's is ended."""

import signal
import tempfile
import time

import pytest

from tests.ray_nodes import ENVIRONMENT, RayNodes, members
from tests.scripts.processes import finish, processes_of

ENDLESS = ("trainer.max_steps=100000", "eval.prompts=0")


def in_mid_run(process):
    assert any(line.startswith("step") for line in process.stdout)


def once_it_runs(process, command):
    """Wait until a program that it starts is there."""
    while not any(command in running for running in members(process.pid).values()):
        assert process.poll() is None
        time.sleep(0.02)


class JoinedCluster:
    """A cluster that is not ours: its address, its session, and the processes that it began with."""

    def __init__(self, address, session):
        self.address, self.session = address, session
        self.own = members(session).keys()

    def guests(self):
        return {process: command for process, command in members(self.session).items() if process not in self.own}

    def guests_after_a_while(self):
        deadline = time.monotonic() + 10
        while self.guests() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.guests()

    def is_whole(self):
        return self.own <= members(self.session).keys()


@pytest.fixture(scope="module")
def joined():
    """Asks for a token, as Ray likes."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = RayNodes(folder)
        try:
            yield JoinedCluster(nodes.address, nodes.start(cpus=2))
        finally:
            nodes.close()


def test_a_driver_killed_while_ray_starts_leaves_no_process(train):
    process = train(*ENDLESS)
    once_it_runs(process, "raylet/raylet")
    process.kill()
    process.communicate()
    assert processes_of(process.pid) == []


def test_sigterm_while_ray_starts_is_an_interruption_and_leaves_no_process(train):
    process = train(*ENDLESS)
    once_it_runs(process, "gcs_server")
    process.terminate()
    code, stdout, _ = finish(process)
    assert code == 130
    assert "interrupted after 0 steps" in stdout
    assert processes_of(process.pid) == []


def check_that_ending_it_leaves_a_joined_cluster_as_it_was(train, joined, number):
    process = train(*ENDLESS, f"cluster.address={joined.address}")
    in_mid_run(process)
    assert any(command.startswith("ray::") for command in joined.guests().values())
    process.send_signal(number)
    finish(process)
    assert joined.guests_after_a_while() == {}
    assert joined.is_whole()


def test_a_killed_driver_leaves_a_joined_cluster_as_it_was(train, joined):
    check_that_ending_it_leaves_a_joined_cluster_as_it_was(train, joined, signal.SIGKILL)


def test_a_run_that_is_done_leaves_a_joined_cluster_as_it_was(train, joined):
    code, _, stderr = finish(train("trainer.max_steps=1", "eval.prompts=0", f"cluster.address={joined.address}"))
    assert (code, stderr) == (0, "")
    assert joined.guests_after_a_while() == {}
    assert joined.is_whole()


def test_a_killed_driver_leaves_nothing_of_its_cluster_and_does_not_disturb_another_run(train):
    """The one that is not killed goes on to an orderly end, which takes all of its actors."""
    survivor, victim = (train(*ENDLESS, f"hydra.run.dir={name}") for name in ("survivor", "victim"))
    in_mid_run(victim)
    in_mid_run(survivor)
    assert len(members(victim.pid)) > 5  # the actors among them
    victim.kill()
    victim.communicate()
    assert processes_of(victim.pid) == []
    survivor.send_signal(signal.SIGINT)
    code, _, stderr = finish(survivor)
    assert (code, stderr) == (130, "")
    assert processes_of(survivor.pid) == []
