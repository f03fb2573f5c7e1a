"""Generation beside training: the asynchronous loop against the synchronous one and against each stage alone."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.figures import Figure
from benchmarks.runs import run_on
from benchmarks.stages import EVEN_TOKENS, nouns, specs
from grpo.cluster.connect import ray_cluster
from grpo.cluster.launch import launch_actors
from grpo.config.actors import GeneratorConfig, ModelConfig, TrainerConfig
from grpo.config.algorithm import BufferConfig, RolloutConfig
from grpo.config.operation import CheckpointConfig, ClusterConfig
from grpo.config.schema import RunConfig
from grpo.models.tiny import character_tokenizer, tiny_llama
from grpo.observe.terminal.display import Display
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle

GROUPS, GROUP_SIZE, MOST_TOKENS = 8, 8, 256
_MODELS = {"1M": {"width": 128, "layers": 4}, "10M": {"width": 384, "layers": 6}}
_OLDEST = 4  # batches enough under way for the longest completion to hold up none
_WARM_UP = 4  # steps, in which the pipeline fills


@dataclass(frozen=True)
class Pace:
    """Per step, over the steps after the warm-up."""

    step_s: float
    wait_s: float

    @property
    def wait_fraction(self) -> float:
        return self.wait_s / self.step_s


@dataclass(frozen=True)
class Paces:
    """With completions of one kind. Each stage alone has as many tickets as the asynchronous runs, so that the
    generator's rows are always full; with heavy tails the quick form leaves that out."""

    alone: Mapping[str, Pace]
    synchronous: Pace
    by_age: Mapping[int, Pace]

    @property
    def fastest(self) -> Pace:
        return min(self.by_age.values(), key=lambda pace: pace.step_s)

    @property
    def gain(self) -> float:
        return self.synchronous.step_s / self.fastest.step_s

    @property
    def ideal_gain(self) -> float:
        return sum(pace.step_s for pace in self.alone.values()) / self.slower_s

    @property
    def slower_s(self) -> float:
        return max(pace.step_s for pace in self.alone.values())

    @property
    def trainer_is_slower(self) -> bool:
        return bool(self.alone) and self.alone["trainer"].step_s == self.slower_s


@dataclass(frozen=True)
class Actors:
    """They serve one run after another."""

    handles: Mapping[str, ActorHandle]
    folder: str
    steps: int
    failures: Failures

    async def paces(self, *, even: bool, ages: tuple[int, ...], alone: bool = True) -> Paces:
        idle = {"generator": {"trainer": False}, "trainer": {"generator": False}} if alone else {}
        return Paces(
            {stage: await self._pace(1, even, **other) for stage, other in idle.items()},
            await self._pace(0, even),
            {age: await self._pace(age, even) for age in ages},
        )

    async def _pace(self, age: int, even: bool, **stages: bool) -> Pace:
        watch = _Watch()
        await run_on(nouns(self.handles, **stages), _config(self.folder, self.steps, age, even), self.failures, watch)
        return watch.pace()


def run(quick: bool) -> list[Figure]:
    with ray_cluster(ClusterConfig()):
        if quick:
            return asyncio.run(_of_model("1M", (1,), (_OLDEST,), steps=12, tails_alone=False))
        small = asyncio.run(_of_model("1M", (1, 2, _OLDEST), (1, 2, _OLDEST), steps=24))
        return [*small, *asyncio.run(_of_model("10M", (1, _OLDEST), (1, _OLDEST), steps=24))]


async def _of_model(
    model: str, even_ages: tuple[int, ...], tails_ages: tuple[int, ...], *, steps: int, tails_alone: bool = True
) -> list[Figure]:
    with _folder(**_MODELS[model]) as folder:
        config = _config(folder, steps, _OLDEST, False)
        async with launch_actors(specs(config), config, failures := Failures(config.recovery)) as handles:
            actors = Actors(handles, folder, steps, failures)
            even = await actors.paces(even=True, ages=even_ages)
            tails = await actors.paces(even=False, ages=tails_ages, alone=tails_alone)
    rate = even.slower_s / even.fastest.step_s
    return [
        *_times(f"{model}, even", even),
        Figure("overlap", f"{model}, even: rate over that of the slower stage", rate, at_least=0.9),
        Figure("overlap", f"{model}, even: ideal gain (g + t) / max(g, t)", even.ideal_gain),
        Figure(
            "overlap", f"{model}, even: gain over synchronous, of the ideal", even.gain / even.ideal_gain, at_least=0.85
        ),
        _waits(f"{model}, even", even),
        *_times(f"{model}, heavy tails", tails),
        Figure("overlap", f"{model}, heavy tails: gain over synchronous", tails.gain, at_least=even.ideal_gain),
        _waits(f"{model}, heavy tails", tails),
    ]


def _times(what: str, paces: Paces) -> list[Figure]:
    named = {f"{stage} alone": pace for stage, pace in paces.alone.items()} | {"synchronous": paces.synchronous}
    named |= {f"max_policy_age {age}": pace for age, pace in paces.by_age.items()}
    return [Figure("overlap", f"{what}: {name}", pace.step_s, "s") for name, pace in named.items()]


def _waits(what: str, paces: Paces) -> Figure:
    at_most = 0.1 if paces.trainer_is_slower else None
    return Figure("overlap", f"{what}: trainer waits", paces.fastest.wait_fraction, at_most=at_most)


@contextmanager
def _folder(width: int, layers: int) -> Iterator[str]:
    """An untrained Llama of that size."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(width=width, layers=layers).save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
        yield folder


def _config(folder: str, steps: int, age: int, even: bool) -> RunConfig:
    """Of the real loop on Ray; trainer and generator have a thread each."""
    return RunConfig(
        model=ModelConfig(path=folder),
        rollout=RolloutConfig(group_size=GROUP_SIZE, max_completion_tokens=EVEN_TOKENS if even else MOST_TOKENS),
        buffer=BufferConfig(max_policy_age=age),
        trainer=TrainerConfig(groups_per_step=GROUPS, max_steps=steps),
        generator=GeneratorConfig(max_sequences=GROUPS * GROUP_SIZE),  # synchronous or not
        checkpoint=CheckpointConfig(every=0),
    )


class _Watch(Display):
    def __init__(self) -> None:
        self._at_s: list[float] = []
        self._waits_s: list[float] = []

    def step(self, metrics: Mapping[str, float]) -> None:
        self._at_s.append(time.perf_counter())
        self._waits_s.append(metrics["time/trainer_wait_s"])

    def pace(self) -> Pace:
        steps = len(self._at_s) - _WARM_UP
        waited_s = sum(self._waits_s[_WARM_UP:])
        return Pace((self._at_s[-1] - self._at_s[_WARM_UP - 1]) / steps, waited_s / steps)
