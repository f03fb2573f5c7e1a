"""A run on several nodes: one joins and gets a generator, another is lost, and the reward rises."""

import json
import os
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest

from tests.ray_nodes import ENVIRONMENT, ROOT, JoinedNode, members

pytestmark = pytest.mark.long


class JoinedRun:
    """An endless run with a tiny random model, which gets a second generator as soon as the cluster has room for it."""

    def __init__(self, folder, address, model):
        self._folder = folder
        cluster = (f"cluster.address={address}", "generator.max_replicas=2")
        endless = ("trainer.max_steps=100000", "trainer.lr_schedule=constant", "eval.prompts=0", "seed=11")
        small = ("model=hf", f"model.path={model}", "trainer.lr=1e-3", "trainer.groups_per_step=8", "reward.workers=1")
        reward = ("~reward.functions.task", "+reward.functions={tests.fake_rewards.vowel_share: 1.0}")
        self.process = subprocess.Popen(
            [
                sys.executable, str(ROOT / "scripts/train.py"), *cluster, *endless, *small, *reward,
                f"hydra.run.dir={folder}", "checkpoint.every=0", "observe.report=false",
            ],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_for(self, condition):
        deadline = time.monotonic() + 600
        while not condition(self.steps()):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def steps(self):
        return self._lines("metrics.jsonl")

    def deaths(self):
        return {event["actor"] for event in self._lines("events.jsonl") if event["event"] == "died"}

    def summary(self):
        return json.loads((self._folder / "summary.json").read_text())

    def _lines(self, name):
        file = self._folder / name
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rewards(steps):
    return [step["reward/mean"] for step in steps]


def actors(node):
    """The names of those that a node runs."""
    titles = [command.removeprefix("ray::") for command in members(node).values() if command.startswith("ray::")]
    return {title.partition(".")[0].partition("-")[0].lower() for title in titles}


def test_a_node_joins_and_another_is_lost_and_the_reward_rises_and_the_head_is_left_as_it_was(
    nodes, tmp_path, tiny_model_path
):
    head, second = nodes.start(cpus=1), nodes.start(cpus=1)  # one has room for the trainer, one for a generator
    joined = JoinedNode(nodes.address, head)
    run = JoinedRun(tmp_path / "run", nodes.address, tiny_model_path)
    run.wait_for(lambda steps: len(steps) >= 5)
    assert len({"trainer", "generator"} & actors(head)) == len({"trainer", "generator"} & actors(second)) == 1
    assert run.steps()[-1]["generator/replicas"] == 1
    nodes.start(cpus=1)
    run.wait_for(lambda steps: steps[-1]["generator/replicas"] == 2)
    lost, enough = actors(second), max(60, len(run.steps()) + 10)
    nodes.kill(second)
    run.wait_for(lambda steps: len(steps) >= enough and fmean(rewards(steps[-10:])) >= 0.85)
    assert fmean(rewards(run.steps()[:10])) <= 0.3
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(timeout=300) == 130
    assert joined.guests_after_a_while() == {}
    assert joined.is_whole()
    assert lost & {"trainer", "generator"} <= {name.partition("-")[0] for name in run.deaths()}
    assert run.summary()["max_policy_age_seen"] <= 1
