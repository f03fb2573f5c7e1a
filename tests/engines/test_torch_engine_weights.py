import asyncio
import copy
import dataclasses
import threading

import numpy as np
import pytest
from engine_helpers import (
    ARCHITECTURES,
    at_forward,
    begin,
    begin_update,
    full_logprobs,
    gpt2,
    greedy,
    greedy_tokens,
    llama,
    logprobs_over_kept_cache,
    prompt_of,
    serving,
    weights_of,
)

from grpo.engines.torch import engine as torch_engine
from grpo.engines.torch import kv_cache
from grpo.errors import WeightsError
from grpo.types import SamplingParams


async def generate_through_update(model, new, *, swap, params, prompt, **settings):
    """A group during which `new` becomes version 1 after `swap` tokens."""
    updates = []
    async with serving(model, **settings) as engine:

        async def update():
            updates.append(await begin_update(engine, weights_of(new, 1)))

        at_forward(model, swap, update)
        group = await engine.generate(prompt, params)
        await updates[0]
        assert engine.version == 1
    return group


async def test_an_update_takes_effect():
    new = llama(seed=2)
    async with serving(llama()) as engine:
        assert engine.version == 0
        await engine.update_weights(weights_of(new, 7))
        assert engine.version == 7
        (completion,) = await engine.generate(prompt_of(4), greedy(8))
    assert completion.token_ids.tolist() == greedy_tokens(new, prompt_of(4), 8)
    assert completion.versions == ((7, 8),)


@pytest.mark.parametrize("make_model", ARCHITECTURES)
@pytest.mark.parametrize("swap", [1, 6])
async def test_recompute_goes_on_as_if_the_new_weights_had_read_everything(make_model, swap):
    model, old, new = make_model(), make_model(), make_model(seed=2)
    group = await generate_through_update(
        model,
        new,
        swap=swap,
        params=SamplingParams(n=3, max_tokens=12),
        prompt=prompt_of(5),
        weight_update="in_flight_recompute",
    )
    for completion in group:
        assert completion.versions == ((0, swap), (1, 12 - swap))
        before, after = full_logprobs(old, prompt_of(5), completion), full_logprobs(new, prompt_of(5), completion)
        np.testing.assert_allclose(completion.logprobs[:swap], before[:swap], atol=1e-4)
        np.testing.assert_allclose(completion.logprobs[swap:], after[swap:], atol=1e-4)


@pytest.mark.parametrize("make_model", [llama, gpt2])
async def test_in_flight_goes_on_over_the_old_keys_and_values(make_model):
    model, old, new = make_model(), make_model(), make_model(seed=2)
    group = await generate_through_update(
        model, new, swap=5, params=SamplingParams(n=2, max_tokens=12), prompt=prompt_of(6), weight_update="in_flight"
    )
    for completion in group:
        assert completion.versions == ((0, 5), (1, 7))
        before = full_logprobs(old, prompt_of(6), completion)
        kept = logprobs_over_kept_cache(old, new, prompt_of(6), completion.token_ids, swap=5)
        recomputed = full_logprobs(new, prompt_of(6), completion)[5:]
        np.testing.assert_allclose(completion.logprobs[:5], before[:5], atol=1e-4)
        np.testing.assert_allclose(completion.logprobs[5:], kept, atol=1e-4)
        assert np.abs(completion.logprobs[5:] - recomputed).max() > 0.01


async def test_recompute_covers_rows_of_every_length_in_several_passes(monkeypatch):
    monkeypatch.setattr(kv_cache, "_PREFILL_TOKENS", 20)
    model, new, running, updates = llama(), llama(seed=2), [], []
    params = SamplingParams(n=2, max_tokens=12)
    async with serving(model, weight_update="in_flight_recompute") as engine:

        async def join():
            running.append(await begin(engine.generate(prompt_of(8), params)))

        async def update():
            updates.append(await begin_update(engine, weights_of(new, 1)))

        at_forward(model, 3, join)
        at_forward(model, 7, update)
        running.append(await begin(engine.generate(prompt_of(1), params)))
        early, late = [await task for task in running]
        await updates[0]
    for prompt, group in ((prompt_of(1), early), (prompt_of(8), late)):
        for completion in group:
            swap = completion.versions[0][1]
            expected = full_logprobs(new, prompt, completion)[swap:]
            np.testing.assert_allclose(completion.logprobs[swap:], expected, atol=1e-4)
    assert early[0].versions != late[0].versions


async def test_each_token_of_a_completion_knows_its_version_through_several_updates():
    model, updates = llama(), []
    async with serving(model) as engine:

        def update_to(version):
            async def update():
                updates.append(await begin_update(engine, weights_of(llama(seed=version), version)))

            return update

        for number, version in ((2, 3), (3, 4), (7, 9)):
            at_forward(model, number, update_to(version))
        (completion,) = await engine.generate(prompt_of(3), greedy(10))
        await asyncio.gather(*updates)
    assert completion.versions == ((0, 2), (3, 1), (4, 4), (9, 3))


async def test_drain_gives_every_completion_one_version():
    model, old, new, late, order = llama(), llama(), llama(seed=2), [], []
    async with serving(model, weight_update="drain") as engine:

        async def update():
            late.append(await begin_update(engine, weights_of(new, 1)))
            late.append(await begin(engine.generate(prompt_of(6), greedy(5))))
            late[0].add_done_callback(lambda _: order.append("updated"))
            late[1].add_done_callback(lambda _: order.append("generated"))

        at_forward(model, 3, update)
        first = await engine.generate(prompt_of(4), SamplingParams(n=3, max_tokens=9))
        _, (second,) = await asyncio.gather(*late)
    for completion in first:
        assert completion.versions == ((0, 9),)
        np.testing.assert_allclose(completion.logprobs, full_logprobs(old, prompt_of(4), completion), atol=1e-4)
    assert second.versions == ((1, 5),)
    assert second.token_ids.tolist() == greedy_tokens(new, prompt_of(6), 5)
    assert order == ["updated", "generated"]


async def test_drain_with_two_updates_pending_starts_new_work_under_the_last():
    model, late = llama(), []
    async with serving(model, weight_update="drain") as engine:

        async def update():
            late.extend([await begin_update(engine, weights_of(llama(seed=v), v)) for v in (2, 3)])
            late.append(await begin(engine.generate(prompt_of(6), greedy(5))))

        at_forward(model, 2, update)
        (first,) = await engine.generate(prompt_of(4), greedy(6))
        _, _, (second,) = await asyncio.gather(*late)
    assert (first.versions, second.versions) == (((0, 6),), ((3, 5),))


def renamed(weights):
    first, *rest = weights.specs
    return dataclasses.replace(weights, specs=(dataclasses.replace(first, name="model.other"), *rest))


def reshaped(weights):
    first, *rest = weights.specs
    return dataclasses.replace(weights, specs=(dataclasses.replace(first, shape=first.shape[::-1]), *rest))


def incomplete(weights):
    return dataclasses.replace(weights, specs=weights.specs[:-1])


@pytest.mark.parametrize("spoil", [renamed, reshaped, incomplete])
async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(spoil):
    model, old, refusals = llama(), llama(), []
    async with serving(model) as engine:

        async def update():
            refusals.append(await begin_update(engine, spoil(weights_of(llama(seed=2), 1))))

        at_forward(model, 3, update)
        (completion,) = await engine.generate(prompt_of(4), greedy(8))
        with pytest.raises(WeightsError, match="does not fit"):
            await refusals[0]
        assert engine.version == 0
        (later,) = await engine.generate(prompt_of(5), greedy(8))
    for prompt, found in ((prompt_of(4), completion), (prompt_of(5), later)):
        assert found.token_ids.tolist() == greedy_tokens(old, prompt, 8)
        assert found.versions == ((0, 8),)


async def test_a_cancelled_update_does_not_stop_the_engine():
    model, updates = llama(), []
    async with serving(model, weight_update="drain") as engine:

        async def update_and_give_up():
            updates.append(await begin_update(engine, weights_of(llama(seed=2), 1)))
            updates[0].cancel()

        at_forward(model, 3, update_and_give_up)
        (completion,) = await engine.generate(prompt_of(4), greedy(8))
        (later,) = await engine.generate(prompt_of(4), greedy(8))
    assert completion.versions == ((0, 8),)
    assert len(later.token_ids) == 8
    assert updates[0].cancelled()


async def test_closing_while_weights_load_raises_at_the_update(monkeypatch):
    loop, loading, gate = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow_swap(_staged):
        loop.call_soon_threadsafe(loading.set)
        gate.wait(30)

    monkeypatch.setattr(torch_engine.StagedWeights, "swap", slow_swap)
    async with serving(llama()) as engine:
        update = await begin_update(engine, weights_of(llama(seed=2), 1))
        await loading.wait()
        closing = await begin(engine.close())
        gate.set()
        await closing
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(update, 60)


async def test_generation_goes_on_while_weights_are_checked(monkeypatch):
    checking, gate = threading.Event(), threading.Event()

    def slow_check(_weights):
        checking.set()
        assert gate.wait(30)

    monkeypatch.setattr(torch_engine, "check_intact", slow_check)
    async with serving(llama()) as engine:
        updates = [await begin(engine.update_weights(weights_of(llama(seed=v), v))) for v in (2, 3)]
        await asyncio.to_thread(checking.wait, 30)
        (completion,) = await engine.generate(prompt_of(4), greedy(8))
        assert completion.versions == ((0, 8),)
        gate.set()
        await asyncio.gather(*updates)
        assert engine.version == 3  # in the order of the calls


async def test_weights_in_read_only_memory_are_decoded_with_and_not_written_to():
    new = llama(seed=2)
    weights = weights_of(new, 1)
    weights.buffer.flags.writeable = False
    before = weights.buffer.copy()
    async with serving(llama()) as engine:
        await engine.update_weights(weights)
        (completion,) = await engine.generate(prompt_of(4), greedy(8))
        assert completion.token_ids.tolist() == greedy_tokens(new, prompt_of(4), 8)
        await engine.update_weights(weights_of(llama(seed=3), 2))
    assert np.array_equal(weights.buffer, before)


async def test_the_published_weights_are_not_changed_by_loading_them():
    weights = weights_of(llama(seed=2), 1)
    before = copy.deepcopy(weights.buffer)
    async with serving(llama()) as engine:
        await engine.update_weights(weights)
        await engine.generate(prompt_of(4), greedy(3))
    assert np.array_equal(weights.buffer, before)
