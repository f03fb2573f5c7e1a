import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from grpo.engines import simulated
from grpo.engines.simulated import SimulatedEngine
from grpo.types import SamplingParams
from grpo.utils import torch_utils
from grpo.weights.payload import Weights

PROMPT = np.array([1, 2, 3])


def weights(version):
    return Weights(version, (), np.zeros(0, dtype=np.uint8))


@pytest.fixture
def clock(monkeypatch):
    """The engine's clock; it stands still unless a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(torch_utils, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def sleeps(monkeypatch):
    """The engine's sleeps, as (seconds, event that ends the sleep)."""
    sleeps = []

    async def sleep(seconds):
        sleeps.append((seconds, asyncio.Event()))
        await sleeps[-1][1].wait()

    monkeypatch.setattr(simulated, "asyncio", SimpleNamespace(sleep=sleep))
    return sleeps


async def test_the_same_request_gets_the_same_answer():
    engine = SimulatedEngine(mean_tokens=5)
    params = SamplingParams(n=3, max_tokens=20, seed=4)
    first, again = await engine.generate(PROMPT, params), await engine.generate(PROMPT, params)
    other = await SimulatedEngine(mean_tokens=5).generate(PROMPT, SamplingParams(n=3, max_tokens=20, seed=5))
    texts = [[completion.token_ids.tolist() for completion in group] for group in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


async def test_lengths_are_cut_at_the_limit():
    group = await SimulatedEngine(mean_tokens=10).generate(PROMPT, SamplingParams(n=400, max_tokens=12))
    lengths = [len(completion.token_ids) for completion in group]
    assert max(lengths) == 12
    assert min(lengths) >= 1
    for completion in group:
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == 12
    cut = sum(completion.finish_reason == "length" for completion in group) / len(group)
    assert cut == pytest.approx(0.9**12, abs=0.07)  # of a geometric distribution with mean 10


async def test_without_a_mean_every_completion_fills_the_limit():
    group = await SimulatedEngine().generate(PROMPT, SamplingParams(n=4, max_tokens=9))
    assert [len(completion.token_ids) for completion in group] == [9] * 4


async def test_completions_are_well_formed():
    group = await SimulatedEngine(mean_tokens=4, vocabulary=8).generate(PROMPT, SamplingParams(n=20, max_tokens=6))
    for completion in group:
        count = len(completion.token_ids)
        assert completion.logprobs.shape == (count,)
        assert completion.logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, -np.log(8), rtol=1e-6)
        assert completion.versions == ((0, count),)
        assert set(completion.token_ids.tolist()) <= set(range(8))


async def test_calls_fail_at_the_configured_rate():
    engine = SimulatedEngine(failure_rate=0.2)
    calls = (engine.generate(PROMPT, SamplingParams(max_tokens=1, seed=seed)) for seed in range(1000))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert len(failures) / 1000 == pytest.approx(0.2, abs=0.04)
    assert all(isinstance(failure, RuntimeError) for failure in failures)
    assert engine.stats().tokens == 1000 - len(failures)


async def test_tokens_are_counted():
    engine = SimulatedEngine(mean_tokens=5)
    groups = [await engine.generate(PROMPT, SamplingParams(n=3, max_tokens=8, seed=seed)) for seed in range(4)]
    assert engine.stats().tokens == sum(len(completion.token_ids) for group in groups for completion in group)


async def test_busy_is_the_time_in_which_anything_runs(clock, sleeps):
    engine = SimulatedEngine(latency_s=3.0)
    clock.now = 1.0
    calls = [asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=2, seed=i))) for i in range(2)]
    await asyncio.sleep(0)
    assert [seconds for seconds, _ in sleeps] == [3.0, 3.0]
    clock.now = 3.0
    assert engine.stats().busy_s == 2.0  # also while it runs
    sleeps[0][1].set()
    await calls[0]
    clock.now = 7.0
    sleeps[1][1].set()
    await calls[1]
    clock.now = 20.0
    assert engine.stats().busy_s == 6.0


async def test_a_cancelled_call_no_longer_counts_as_busy(clock, sleeps):
    engine = SimulatedEngine(latency_s=3.0)
    call = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=2)))
    await asyncio.sleep(0)
    clock.now = 2.0
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    clock.now = 9.0
    assert (engine.stats().busy_s, engine.stats().tokens) == (2.0, 0)


async def test_latency_varies_by_the_seed_around_its_median(sleeps):
    engine = SimulatedEngine(latency_s=2.0, latency_sigma=0.5)
    calls = [asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=1, seed=i))) for i in range(200)]
    await asyncio.sleep(0)
    seconds = [slept for slept, _ in sleeps]
    for _, event in sleeps:
        event.set()
    await asyncio.gather(*calls)
    assert np.median(seconds) == pytest.approx(2.0, rel=0.15)
    assert np.log(seconds).std() == pytest.approx(0.5, rel=0.15)


async def test_the_version_follows_the_update(sleeps):
    engine = SimulatedEngine(load_s=4.0)
    update = asyncio.create_task(engine.update_weights(weights(6)))
    await asyncio.sleep(0)
    assert (engine.version, sleeps[0][0]) == (0, 4.0)
    sleeps[0][1].set()
    await update
    assert engine.version == 6


async def test_a_group_has_the_version_that_it_began_with(sleeps):
    engine = SimulatedEngine()
    call = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=3)))
    await asyncio.sleep(0)
    update = asyncio.create_task(engine.update_weights(weights(1)))
    await asyncio.sleep(0)
    sleeps[1][1].set()
    await update
    sleeps[0][1].set()
    (completion,) = await call
    assert completion.versions == ((0, 3),)
    call = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=3)))
    await asyncio.sleep(0)
    sleeps[2][1].set()
    (completion,) = await call
    assert completion.versions == ((1, 3),)
    await engine.close()
