"""The real loop on Ray with 10,000 episodes at once, whose generator and environments only wait.

Beside it the same number of groups of one turn that take as long, for what the turns cost the driver.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure
from benchmarks.runs import Pace, Watch, run_on
from benchmarks.simulated_actors import (
    EpisodeTimes,
    IdleDataloader,
    IdleGenerator,
    IdleReward,
    IdleTrainer,
    TurnGenerator,
)
from grpo.actors.environment import EnvironmentHost
from grpo.actors.replay_buffer import ReplayBuffer
from grpo.actors.specs import ActorSpec
from grpo.cluster.actor import RayEndpoint
from grpo.cluster.connect import ray_cluster
from grpo.cluster.launch import launch_actors
from grpo.config.actors import ModelConfig, TrainerConfig
from grpo.config.algorithm import BufferConfig, RolloutConfig, TaskConfig
from grpo.config.operation import CheckpointConfig, ClusterConfig
from grpo.config.schema import RunConfig
from grpo.models.tiny import character_tokenizer
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle

TURNS = 4
GROUP_SIZE = 8
GROUPS_PER_STEP = 16
WAVES = 4  # each is as many groups as are played at once; the figures are of the last two


@dataclass(frozen=True)
class Case:
    """So many groups at once, and the mean seconds of a turn. The two give the rate of turns."""

    groups: int
    turn_s: float

    @property
    def times(self) -> EpisodeTimes:
        return EpisodeTimes(TURNS, self.turn_s, staggered=self.groups)

    @property
    def group_s(self) -> float:
        """Return the mean seconds of a group that nothing holds up."""
        later = range(self.groups, WAVES * self.groups)
        return float(np.mean([self.times.group(serial, GROUP_SIZE) for serial in later]))

    @property
    def steps(self) -> int:
        return WAVES * self.groups // GROUPS_PER_STEP


@dataclass(frozen=True)
class Played:
    """Measured over a run of episodes. `environment_s` is the CPU time of the environment actor per turn."""

    pace: Pace
    environment_s: float
    environment_lag_ms: float


def run(quick: bool) -> list[Figure]:
    with ray_cluster(ClusterConfig()):
        return asyncio.run(_run(Case(125, 1.5) if quick else Case(1250, 9.0)))


async def _run(case: Case) -> list[Figure]:
    group_s = case.group_s
    async with _actors(case, group_s) as (actors, failures):
        played = await _play(actors, failures, case)
        config = _config(case)
        common = {name: actors[name] for name in ("dataloader", "replay_buffer", "trainer")}
        one_turn = {**common, "generator": actors["one_turn"], "reward": actors["reward"]}
        single = await _pace(one_turn, config, failures, case)
    episodes = case.groups * GROUP_SIZE
    ideal = case.groups / group_s
    return [
        _figure(f"{episodes} at once: groups/s over ideal", played.pace.groups_per_s / ideal, at_least=0.9),
        _figure("turns/s", played.pace.groups_per_s * GROUP_SIZE * TURNS, "turns/s"),
        _figure("driver's loop lag p99", played.pace.lag_p99_ms, "ms", at_most=50.0),
        _figure("environment actor's loop lag p99", played.environment_lag_ms, "ms", at_most=50.0),
        _figure("environment actor's CPU per turn", 1000 * played.environment_s, "ms", at_most=1.5),
        _figure("driver's actor calls per group", played.pace.calls_per_group, at_most=4.0),
        _figure("driver's CPU per group", 1000 * played.pace.cpu_s, "ms"),
        _figure(f"driver's CPU per group, {TURNS} turns over one", played.pace.cpu_s / single.cpu_s, at_most=1.2),
        _figure("one turn: groups/s over ideal", single.groups_per_s / ideal),
    ]


def _figure(name: str, value: float, unit: str = "", **target: float) -> Figure:
    return Figure("episodes", name, value, unit, **target)


@asynccontextmanager
async def _actors(case: Case, group_s: float) -> AsyncIterator[tuple[Mapping[str, ActorHandle], Failures]]:
    """Start the actors of a run without a model. The environment actor is the real one."""
    with tempfile.TemporaryDirectory() as folder:
        character_tokenizer().save_pretrained(folder)
        config = _config(case, folder)
        one_turn = {"latency_s": group_s, "spread": 0.2, "staggered": case.groups}
        specs = [
            ActorSpec("dataloader", IdleDataloader),
            ActorSpec("generator", TurnGenerator, {"times": case.times}),
            ActorSpec("one_turn", IdleGenerator, one_turn),
            ActorSpec("reward", IdleReward),
            ActorSpec("environment", EnvironmentHost, {"config": config}),
            ActorSpec("replay_buffer", ReplayBuffer, {"window": 1}),
            ActorSpec("trainer", IdleTrainer),
        ]
        failures = Failures(config.recovery)
        async with launch_actors(specs, config, failures) as actors:
            yield actors, failures


def _config(case: Case, model: str = "") -> RunConfig:
    """Return a config whose `max_policy_age` lets every rollout run at once."""
    return RunConfig(
        model=ModelConfig(path=model),
        task=TaskConfig("benchmarks.simulated_actors:WaitingTask", asdict(case.times)),
        rollout=RolloutConfig(concurrency=case.groups, group_size=GROUP_SIZE, max_prompt_tokens=32),
        buffer=BufferConfig(max_policy_age=2 * case.groups // GROUPS_PER_STEP),
        trainer=TrainerConfig(groups_per_step=GROUPS_PER_STEP, max_steps=case.steps),
        checkpoint=CheckpointConfig(every=0),
    )


async def _play(actors: Mapping[str, ActorHandle], failures: Failures, case: Case) -> Played:
    nouns = ("dataloader", "generator", "environment", "replay_buffer", "trainer")
    [process] = actors["environment"].processes()
    assert isinstance(process, RayEndpoint)
    assert process.pid is not None
    await process.drain(keep_recording=False)
    cpu_before = _cpu_s(process.pid)
    pace = await _pace({name: actors[name] for name in nouns}, _config(case), failures, case)
    cpu_s = _cpu_s(process.pid) - cpu_before
    measured = (await process.drain(keep_recording=False)).metrics.drain()
    turns = actors["environment"].replica_stats()["environment"]["requests"] * GROUP_SIZE * TURNS
    return Played(pace, cpu_s / turns, measured["environment/loop_lag_ms/p99"])


async def _pace(actors: Mapping[str, ActorHandle], config: RunConfig, failures: Failures, case: Case) -> Pace:
    watch, before = Watch(), _calls(actors)
    pacer = await run_on(actors, config, failures, watch)
    return watch.pace(GROUPS_PER_STEP, case.steps // 2, (_calls(actors) - before) / pacer.admitted)


def _calls(actors: Mapping[str, ActorHandle]) -> int:
    """Return the number of calls of the driver so far. It leases a generator for each group, which is no call."""
    requests = {
        name: sum(each["requests"] for each in actor.replica_stats().values()) for name, actor in actors.items()
    }
    return sum(requests.values()) - requests.get("environment", 0)


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process, all of its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
