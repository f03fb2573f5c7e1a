"""The real loop on real Ray with real torch actors."""

import asyncio
import json
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.util import placement_group, remove_placement_group

from grpo.actors.specs import actor_specs
from grpo.cluster.connect import check_dashboard, ray_cluster
from grpo.cluster.launch import launch, launch_actors
from grpo.config.operation import ClusterConfig
from grpo.driver.loop import train_loop
from grpo.errors import ActorDied, ConfigError, LaunchError, RewardCrash, RewardError
from grpo.services.failures import Failures
from grpo.services.local import launch_local
from grpo.services.replica import Call
from grpo.types import Completion, Problem, Prompt, SamplingParams

PROMPT = Prompt(0, Problem("cab", "abc"), np.array([5, 6, 7]))
ANSWER = Completion(np.array([5]), np.zeros(1), ((0, 1),), "length")

pytestmark = pytest.mark.usefixtures("ray_session")


@asynccontextmanager
async def launch_only(config, *names, failures=None):
    """Some of the actors: each process costs a second and more."""
    specs = [spec for spec in actor_specs(config) if spec.name in names]
    async with launch_actors(specs, config, failures or Failures(config.recovery)) as handles:
        yield SimpleNamespace(**handles)


async def run_on(launched, config, make_recorder):
    """Losses by step, and the final weights."""
    recorder = make_recorder(config)
    async with launched(config, recorder.failures) as services:
        await train_loop(services, config, recorder, asyncio.Event())
        ((payload, _),) = await services.trainer.push_weights.call()
        checks = await services.generator.update_weights.fanout(payload)
    recorder.run_dir.close()
    steps = [json.loads(line) for line in (recorder.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    return recorder.pacer, steps, checks


async def test_the_loop_on_ray_equals_the_loop_in_one_process(tiny_config, make_recorder):
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = 1
    _, local, _ = await run_on(launch_local, tiny_config, make_recorder)
    _, remote, _ = await run_on(launch, tiny_config, make_recorder)
    assert [step["loss"] for step in remote] == [step["loss"] for step in local]


async def test_an_error_in_a_reward_keeps_its_type_across_processes_and_a_crash_of_one_names_it(tiny_config):
    tiny_config.reward.functions = {"tests.fake_rewards:raising_or_dying": 1.0}
    async with launch_only(tiny_config, "reward") as services:
        with pytest.raises(RewardError, match="cannot score this"):
            await services.reward.score.route(PROMPT, [ANSWER])
        with pytest.raises(RewardCrash, match=r"dying' on prompt .*: its process died with exit code 7"):
            await services.reward.score.route(PROMPT, [ANSWER] * 2)


async def test_no_process_of_a_reward_outlives_its_actor(tiny_config):
    tiny_config.reward.functions = {"tests.fake_rewards:process": 1.0}
    async with launch_only(tiny_config, "reward") as services:
        pid = int((await services.reward.score.route(PROMPT, [ANSWER])).rewards[0])
        assert _runs(pid)
        (replica,) = services.reward.service.replicas
        os.kill(replica.endpoint.pid, signal.SIGKILL)
        await asyncio.to_thread(_wait_until_gone, pid)
        pid = int((await services.reward.score.route(PROMPT, [ANSWER])).rewards[0])
    await asyncio.to_thread(_wait_until_gone, pid)


def _wait_until_gone(pid):
    deadline = time.monotonic() + 120
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(") ")[2][0] != "Z"  # nobody may wait for orphans


@pytest.mark.long
async def test_a_replica_that_is_added_holds_the_present_weights_and_one_that_hangs_is_replaced(tiny_config):
    tiny_config.generator.num_cpus = 0.25
    tiny_config.recovery.health_interval_s, tiny_config.recovery.health_timeout_s = 1.0, 15.0
    failures = Failures(tiny_config.recovery)
    async with launch_only(tiny_config, "generator", "trainer", failures=failures) as services:
        ((weights, _),) = await services.trainer.push_weights.call()
        await services.generator.update_weights.fanout(weights)
        services.generator.scale(2)
        for replica in services.generator.service.replicas:
            await services.generator.service.call_replica(replica, Call("update_weights", (weights,)))
        first, second = services.generator.service.replicas
        old = first.endpoint
        os.kill(old.pid, signal.SIGSTOP)
        answers = [services.generator.generate.route(PROMPT, SamplingParams(n=2, max_tokens=4)) for _ in range(4)]
        assert len(await asyncio.gather(*answers)) == 4  # those that the hanging one took were made again
        assert failures.restarts == {"generator": 1}
        assert "did not answer" in failures.deaths[0].error
        await asyncio.to_thread(_wait_until_gone, old.pid)
        assert first.failures > 0
        assert second.failures == 0


async def test_a_setup_that_fails_is_raised_with_its_type_and_the_others_close(tiny_config, caplog):
    tiny_config.task.target = "grpo.tasks.sorting:Sorted"
    with pytest.raises(ConfigError, match=r"task\.target"):
        async with launch_only(tiny_config, "dataloader", "generator"):
            pass
    assert "did not close:" not in caplog.text  # with an error; one that is slow is another matter


async def test_resources_that_others_hold_are_a_clear_error(tiny_config):
    tiny_config.trainer.num_cpus = len(os.sched_getaffinity(0)) - 0.5
    tiny_config.cluster.start_timeout_s = 1
    held = placement_group([{"CPU": tiny_config.trainer.num_cpus}])
    await held.ready()
    with pytest.raises(LaunchError, match=r"cluster.start_timeout_s: trainer not up after 1 s"):
        async with launch_only(tiny_config, "trainer"):
            pass
    remove_placement_group(held)


async def test_more_than_the_cluster_has_is_refused_at_once(tiny_config):
    tiny_config.trainer.num_gpus = 4
    with pytest.raises(LaunchError, match=r"trainer.num_gpus: the actors ask for 4 GPUs"):
        async with launch(tiny_config, Failures(tiny_config.recovery)):
            pass


async def test_leaving_ends_every_process(tiny_config):
    async with launch_only(tiny_config, "replay_buffer") as services:
        processes = services.replay_buffer.service.processes()
    assert processes
    with pytest.raises(ActorDied):  # a call may still be answered: Ray asks a process to end itself
        await asyncio.wait_for(processes[0].wait_dead(), timeout=60)


def test_signals_are_held_back_while_ray_starts(monkeypatch):
    monkeypatch.setattr("ray.init", lambda **_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(KeyboardInterrupt), ray_cluster(ClusterConfig()):
        raise AssertionError("the run must not begin")


@pytest.mark.parametrize("dashboard", [False, True])
def test_a_cluster_of_our_own_has_a_dashboard_where_it_is_asked_for(monkeypatch, dashboard):
    asked = {}

    def init(**options):
        asked.update(options)
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with ray_cluster(ClusterConfig(dashboard=dashboard)) as address:
        assert address == ("http://127.0.0.1:8265" if dashboard else None)
    assert (asked["include_dashboard"], asked["dashboard_host"]) == (dashboard, "127.0.0.1")


def test_a_dashboard_that_is_not_installed_is_one_line_with_the_fix(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_dashboard(ClusterConfig())
    with pytest.raises(ConfigError, match=r"cluster.dashboard: is not installed: pip install -e '.\[dashboard\]'"):
        check_dashboard(ClusterConfig(dashboard=True))


def test_what_ray_says_when_it_cannot_be_joined_is_one_line(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Version mismatch: cluster\n    Ray: 2.50\nthis process\n    Ray: 2.60\n")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("grpo.cluster.connect.nodes_at", lambda _: [])
    with (
        pytest.raises(LaunchError, match=r"cluster.address: can't reach Ray at auto: .* Ray: 2.50 this .* 2.60"),
        ray_cluster(ClusterConfig(address="auto")),
    ):
        pass
