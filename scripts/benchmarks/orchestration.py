"""Groups per second of the real loop on Ray with actors that only sleep: against the ideal, and a bare Ray program."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from benchmarks.figures import Figure
from benchmarks.runs import Pace, Watch, run_on
from benchmarks.simulated_actors import IdleDataloader, IdleGenerator, IdleReward, IdleTrainer
from grpo.actors.replay_buffer import ReplayBuffer
from grpo.actors.specs import ActorSpec
from grpo.cluster.connect import ray_cluster
from grpo.cluster.launch import launch_actors
from grpo.config.actors import TrainerConfig
from grpo.config.algorithm import BufferConfig, RolloutConfig
from grpo.config.operation import CheckpointConfig, ClusterConfig
from grpo.config.schema import RunConfig
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle
from grpo.types import Group, Prompt, SamplingParams, Ticket

GROUPS_PER_STEP = 16
_SPREAD = 0.2  # of the latency, to either side, for completions differ in length
_GENERATORS = ("instant", "in_step", "mixed")
_RAY_SHARE = 0.8  # of its own call rate, that a fair comparison with the ideal may need


def run(quick: bool) -> list[Figure]:
    with ray_cluster(ClusterConfig()):
        return asyncio.run(_run(quick))


async def _run(quick: bool) -> list[Figure]:
    latency_s, mixed_latency_s = (2.0, 7.0) if quick else (10.0, 10.0)
    concurrencies = (1, 32) if quick else (1, 8, 32, 128, 512, 1024)
    calls_per_s = await _rate_of_empty_calls(seconds=2.0 if quick else 5.0)
    config = RunConfig()
    async with launch_actors(
        _specs(latency_s, mixed_latency_s), config, failures := Failures(config.recovery)
    ) as actors:
        framework = partial(_framework, actors, failures)
        bare, saturated, seconds = [], [], 2.0 if quick else 10.0
        for _ in range(2 if quick else 4):  # alternating, so that a slow moment of the machine meets both
            bare.append(await _bare(seconds))
            saturated.append(await framework("instant", 32, round(20 * seconds)))
        paces = {c: await framework("in_step", c, _steps(c, quick)) for c in concurrencies}
        mixed = await framework("mixed", 1024, _steps(1024, quick))
    fastest = max(saturated, key=lambda pace: pace.groups_per_s)
    ideal = {c: paces[c].groups_per_s * latency_s / c for c in concurrencies}
    needed = 1024 / mixed_latency_s * fastest.calls_per_group / calls_per_s
    figure = _named("orchestration")
    return [
        figure("Ray's own call rate", calls_per_s, "calls/s"),
        figure("groups/s at saturation", fastest.groups_per_s, "groups/s"),
        figure("groups/s over a bare Ray program", fastest.groups_per_s / max(bare), at_least=0.85),
        *(figure(f"groups/s over ideal, {c} rollouts{' in step' * (c == 1024)}", ideal[c]) for c in concurrencies),
        figure("time of 32 rollouts over that of one", ideal[1] / ideal[32], at_most=1.03),
        figure("share of Ray's call rate that 1024 rollouts need", needed),
        figure(
            "groups/s over ideal, 1024 rollouts",
            mixed.groups_per_s * mixed_latency_s / 1024,
            at_least=0.9 if needed < _RAY_SHARE else None,
        ),
        figure("driver's CPU per group, 32 rollouts", 1000 * paces[32].cpu_s, "ms"),
        figure("driver's CPU per group, saturated", 1000 * fastest.cpu_s, "ms"),
        figure("CPU per group, 1024 rollouts over 32", mixed.cpu_s / paces[32].cpu_s, at_most=1.2),
        figure("loop lag p99, 32 rollouts", paces[32].lag_p99_ms, "ms", at_most=10.0),
        figure("actor calls per group", fastest.calls_per_group, at_most=4.0),
    ]


def _named(bench: str) -> Callable[..., Figure]:
    return lambda name, value, unit="", **target: Figure(bench, name, value, unit, **target)


def _steps(concurrency: int, quick: bool) -> int:
    """So many that each rollout makes a few groups."""
    waves = 3 if quick else 5
    return waves * max(1, concurrency // GROUPS_PER_STEP)


async def _framework(
    actors: Mapping[str, ActorHandle], failures: Failures, generator: str, concurrency: int, steps: int
) -> Pace:
    """`max_policy_age` lets every rollout run at once."""
    groups = min(GROUPS_PER_STEP, concurrency)
    config = RunConfig(
        rollout=RolloutConfig(concurrency=concurrency),
        buffer=BufferConfig(max_policy_age=2 * concurrency // groups),
        trainer=TrainerConfig(groups_per_step=groups, max_steps=steps),
        checkpoint=CheckpointConfig(every=0),
    )
    watch, before = Watch(), _requests(actors)
    nouns = {name: actor for name, actor in actors.items() if name not in _GENERATORS}
    pacer = await run_on({**nouns, "generator": actors[generator]}, config, failures, watch)
    wave = concurrency // groups
    calls_per_group = (_requests(actors) - before) / pacer.admitted
    return watch.pace(groups, 2 * wave if generator == "mixed" else wave, calls_per_group)


def _requests(actors: Mapping[str, ActorHandle]) -> int:
    return sum(replica["requests"] for actor in actors.values() for replica in actor.replica_stats().values())


def _specs(latency_s: float, mixed_latency_s: float) -> list[ActorSpec]:
    """The actors of a run without a model, with three generators; none of them reserves a CPU.

    In step, all groups take the same time, so all of them end at once, again and again. Real ones differ in length and
    end at any time: `mixed`.
    """
    mixed = {"latency_s": mixed_latency_s, "spread": _SPREAD, "staggered": 1024}
    return [
        ActorSpec("dataloader", IdleDataloader),
        ActorSpec("instant", IdleGenerator, {"latency_s": 0.0}),
        ActorSpec("in_step", IdleGenerator, {"latency_s": latency_s}),
        ActorSpec("mixed", IdleGenerator, mixed),
        ActorSpec("reward", IdleReward),
        ActorSpec("replay_buffer", ReplayBuffer, {"window": 1}),
        ActorSpec("trainer", IdleTrainer),
    ]


class _BareBuffer(ReplayBuffer):
    """Gets the completions beside the group: only there does Ray bring the value of a reference."""

    async def add(self, ticket: Ticket, group: Group, completions: Any = ()) -> None:
        await super().add(ticket, dataclasses.replace(group, completions=completions))


async def _rate_of_empty_calls(seconds: float) -> float:
    """Calls a second that Ray makes from one driver to four actors that return at once, 32 under way."""
    actor = ray.remote(IdleReward)
    actors = [actor.options(num_cpus=0, max_concurrency=1000).remote() for _ in range(4)]
    await asyncio.gather(*(each.setup.remote() for each in actors))
    count, until = 0, time.perf_counter() + seconds

    async def call(target: Any) -> None:
        nonlocal count
        while time.perf_counter() < until:
            await target.setup.remote()
            count += 1

    await asyncio.gather(*(call(actors[i % 4]) for i in range(32)))
    _end(actors)
    return count / seconds


async def _bare(seconds: float) -> float:
    """Groups a second of a program that makes the same calls of the same actors, and nothing else."""
    classes = (IdleDataloader, IdleGenerator, IdleReward, _BareBuffer, IdleTrainer)
    arguments: tuple[dict[str, Any], ...] = ({}, {"latency_s": 0.0}, {}, {"window": 1}, {})
    dataloader, generator, reward, replay_buffer, trainer = actors = [
        ray.remote(cls).options(num_cpus=0, max_concurrency=1000).remote(**kwargs)
        for cls, kwargs in zip(classes, arguments, strict=True)
    ]
    await asyncio.gather(*(actor.setup.remote() for actor in actors))
    prompts: deque[Prompt] = deque()
    fetching, tickets, places = asyncio.Lock(), itertools.count(), asyncio.Semaphore(3 * GROUPS_PER_STEP)
    params, trained, until = SamplingParams(n=8), 0, time.perf_counter() + seconds

    async def rollouts() -> None:
        while True:
            await places.acquire()
            ticket = Ticket(next(tickets))
            async with fetching:
                if not prompts:
                    batch = await dataloader.sample.remote(ticket.serial, GROUPS_PER_STEP)
                    prompts.extend(batch.prompts)
                prompt = prompts.popleft()
            completions, report_ref = generator.generate.options(num_returns=2).remote(prompt, params)
            report = await report_ref
            scores = await reward.score.remote(prompt, completions)
            group = Group(prompt, (), None, scores.rewards, scores.rewards, report.oldest_version)
            await replay_buffer.add.remote(ticket, group, completions)

    async def training() -> None:
        nonlocal trained
        while time.perf_counter() < until:
            batch, report_ref = replay_buffer.sample.options(num_returns=2).remote(GROUPS_PER_STEP)
            await report_ref
            await trainer.train_step.remote(batch)
            weights, version_ref = trainer.push_weights.options(num_returns=2).remote()
            await version_ref
            _, snapshot_version_ref = trainer.snapshot.options(num_returns=2).remote()
            await asyncio.gather(generator.update_weights.remote(weights), snapshot_version_ref)
            trained += GROUPS_PER_STEP
            for _ in range(GROUPS_PER_STEP):
                places.release()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:  # what fails in a rollout ends it all
        working = [tasks.create_task(rollouts()) for _ in range(32)]
        await training()
        for task in working:
            task.cancel()
    _end(actors)
    return trained / (time.perf_counter() - began)


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)
