"""The rows of a group join one by one, as places become free."""

import asyncio

import numpy as np
import pytest
from engine_helpers import (
    ARCHITECTURES,
    at_forward,
    begin,
    begin_update,
    forward_shapes,
    full_logprobs,
    greedy,
    greedy_tokens,
    llama,
    prompt_of,
    serving,
    weights_of,
)

from grpo.types import SamplingParams


def prefills(shapes):
    return [shape for shape in shapes if shape[1] > 1]


@pytest.mark.parametrize("make_model", ARCHITECTURES)
async def test_rows_that_join_late_decode_as_the_whole_group_would(make_model):
    model, params = make_model(), SamplingParams(n=4, max_tokens=9, seed=5)
    async with serving(model) as engine:
        whole = await engine.generate(prompt_of(6), params)
    async with serving(model, max_rows=4) as engine:
        _, parted = await asyncio.gather(
            engine.generate(prompt_of(3), greedy(4, n=3)), engine.generate(prompt_of(6), params)
        )
    for one, other in zip(whole, parted, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


async def test_a_prompt_is_read_once_though_its_rows_join_at_three_times():
    model = llama()
    shapes = forward_shapes(model)
    async with serving(model, max_rows=3) as engine:
        groups = await asyncio.gather(
            engine.generate(prompt_of(5), greedy(3)),
            engine.generate(prompt_of(4), greedy(6)),
            engine.generate(prompt_of(7), greedy(9, n=3)),
        )
    assert prefills(shapes) == [(3, 7)]
    assert [completion.token_ids.tolist() for completion in groups[2]] == [greedy_tokens(model, prompt_of(7), 9)] * 3


@pytest.mark.parametrize("weight_update", ["in_flight", "in_flight_recompute"])
async def test_rows_that_join_after_an_update_are_of_the_new_weights_alone(weight_update):
    model, new, updates = llama(), llama(seed=2), []
    shapes = forward_shapes(model)
    async with serving(model, max_rows=2, weight_update=weight_update) as engine:

        async def update():
            updates.append(await begin_update(engine, weights_of(new, 1)))

        at_forward(model, 3, update)
        _, (early, late) = await asyncio.gather(
            engine.generate(prompt_of(3), greedy(6)), engine.generate(prompt_of(5), SamplingParams(n=2, max_tokens=9))
        )
        await asyncio.gather(*updates)
    assert early.versions == ((0, 3), (1, 6))
    assert late.versions == ((1, 9),)
    np.testing.assert_allclose(late.logprobs, full_logprobs(new, prompt_of(5), late), atol=1e-4)
    assert prefills(shapes)[-1] == (1, 5)


async def test_drain_lets_the_last_rows_of_a_begun_group_join_first():
    model, late = llama(), []
    async with serving(model, max_rows=2, weight_update="drain") as engine:

        async def update():
            late.append(await begin_update(engine, weights_of(llama(seed=2), 1)))
            late.append(await begin(engine.generate(prompt_of(6), greedy(5))))

        at_forward(model, 3, update)
        _, group = await asyncio.gather(
            engine.generate(prompt_of(3), greedy(6)), engine.generate(prompt_of(5), greedy(6, n=2))
        )
        _, (after,) = await asyncio.gather(*late)
    assert [completion.versions for completion in group] == [((0, 6),), ((0, 6),)]
    assert after.versions == ((1, 5),)


async def test_cancelling_a_group_takes_its_running_rows_and_those_that_wait():
    model, running = llama(), []
    async with serving(model, max_rows=2) as engine:

        async def cancel():
            running[1].cancel()

        at_forward(model, 3, cancel)
        for count, n in ((8, 1), (20, 2), (5, 2)):
            running.append(asyncio.create_task(engine.generate(prompt_of(4), greedy(count, n=n))))
        results = await asyncio.gather(*running, return_exceptions=True)
        assert engine.stats().tokens == 8 + 3 + 2 * 5
    assert isinstance(results[1], asyncio.CancelledError)
    assert [completion.token_ids.tolist() for completion in results[2]] == [greedy_tokens(model, prompt_of(4), 5)] * 2
