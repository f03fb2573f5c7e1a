"""Generation beside training: the asynchronous loop against the synchronous one and against each stage alone."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.stages import specs
from grpo.cluster.launch import launch_actors, ray_cluster
from grpo.config import (
    BufferConfig,
    CheckpointConfig,
    ClusterConfig,
    GeneratorConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
)
from grpo.failures import Failures
from grpo.loop import run as run_loop
from grpo.models.tiny import character_tokenizer, tiny_llama
from grpo.observe.display import Silent
from grpo.observe.recorder import Recorder
from grpo.observe.run_dir import RunDirectory
from grpo.run import make_pacer
from grpo.services import Services

GROUPS, GROUP_SIZE, MOST_TOKENS = 8, 8, 256
_MODELS = {"1M": {"width": 128, "layers": 4}, "10M": {"width": 384, "layers": 6}}
_AGES_OF_TAILS = (4,)  # in the quick form: batches enough under way for the longest completion to hold up none
_WARM_UP = 4  # steps, in which the pipeline fills


@dataclass(frozen=True)
class Pace:
    """Per step, over the steps after the warm-up."""

    step_s: float
    wait_s: float

    @property
    def wait_fraction(self) -> float:
        return self.wait_s / self.step_s


def run(quick: bool) -> list[Figure]:
    with ray_cluster(ClusterConfig()):
        if quick:
            return _of_model("1M", ages=(1,), steps=14, tails_alone=False)
        ages = {"1M": (1, 2, 4), "10M": (1, 4)}
        return [figure for model in _MODELS for figure in _of_model(model, ages[model], steps=24, tails_alone=True)]


def _of_model(model: str, ages: tuple[int, ...], steps: int, *, tails_alone: bool) -> list[Figure]:
    figures, ideal = [], 0.0
    with _folder(**_MODELS[model]) as folder:
        for even in (True, False):
            what = f"{model}, {'even' if even else 'heavy tails'}"

            def pace(age: int, *, even: bool = even, **stages: bool) -> Pace:
                return asyncio.run(_pace(folder, age, steps, even, **stages))

            if even or tails_alone:
                # As many tickets as the asynchronous runs have: the generator's rows are always full.
                g, t = pace(1, trainer=False).step_s, pace(1, generator=False).step_s
                ideal = ideal or (g + t) / max(g, t)
                figures += [_figure(f"{what}: generator alone", g, "s"), _figure(f"{what}: trainer alone", t, "s")]
            synchronous = pace(0)
            figures.append(_figure(f"{what}: synchronous", synchronous.step_s, "s"))
            paces = {age: pace(age) for age in (ages if even or tails_alone else _AGES_OF_TAILS)}
            figures += [_figure(f"{what}: max_policy_age {age}", found.step_s, "s") for age, found in paces.items()]
            fastest = min(paces.values(), key=lambda found: found.step_s)
            gain = synchronous.step_s / fastest.step_s
            if even:
                figures += [
                    _figure(f"{what}: rate over that of the slower stage", max(g, t) / fastest.step_s, at_least=0.9),
                    _figure(f"{what}: ideal gain (g + t) / max(g, t)", ideal),
                    _figure(f"{what}: gain over synchronous, of the ideal", gain / ideal, at_least=0.85),
                ]
            else:
                figures.append(_figure(f"{what}: gain over synchronous", gain, at_least=ideal))
            slower = (even or tails_alone) and t >= g
            waited = _figure(f"{what}: trainer waits", fastest.wait_fraction, at_most=0.1 if slower else None)
            figures.append(waited)
    return figures


def _figure(name: str, value: float, unit: str = "", **target: float | None) -> Figure:
    return Figure("overlap", name, value, unit, **target)


@contextmanager
def _folder(width: int, layers: int) -> Iterator[str]:
    """An untrained Llama of that size."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(width=width, layers=layers).save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
        yield folder


async def _pace(folder: str, age: int, steps: int, even: bool, **stages: bool) -> Pace:
    """The real loop on Ray; trainer and generator have a thread each."""
    config = RunConfig(
        model=ModelConfig(path=folder),
        rollout=RolloutConfig(group_size=GROUP_SIZE, max_completion_tokens=MOST_TOKENS),
        buffer=BufferConfig(max_policy_age=age),
        trainer=TrainerConfig(groups_per_step=GROUPS, max_steps=steps),
        generator=GeneratorConfig(max_sequences=GROUPS * GROUP_SIZE),  # synchronous or not
        checkpoint=CheckpointConfig(every=0),
    )
    watch = _Watch()
    with tempfile.TemporaryDirectory() as run_folder:
        recorder = Recorder(RunDirectory(Path(run_folder)), watch, make_pacer(config), Failures(config.recovery))
        async with launch_actors(specs(config, even=even, **stages), config, recorder.failures) as handles:
            await run_loop(Services(**handles), config, recorder, asyncio.Event())
        recorder.run_dir.close()
    return watch.pace()


class _Watch(Silent):
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
