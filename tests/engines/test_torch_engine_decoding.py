import asyncio

import numpy as np
import pytest
import torch
from engine_helpers import (
    ARCHITECTURES,
    at_forward,
    begin,
    forward_shapes,
    full_logits,
    full_logprobs,
    greedy,
    greedy_tokens,
    llama,
    prompt_of,
    serving,
    sliding_mistral,
)

from grpo.engines.torch import batch, kv_cache
from grpo.engines.torch.kv_cache import KVGrid
from grpo.types import SamplingParams


async def assert_greedy_matches_generate(model, requests, **settings):
    """`requests` are (prompt, number of tokens), handed in at once, in this order."""
    async with serving(model, **settings) as engine:
        groups = await asyncio.gather(*(engine.generate(prompt, greedy(count)) for prompt, count in requests))
    for (prompt, count), (completion,) in zip(requests, groups, strict=True):
        assert completion.token_ids.tolist() == greedy_tokens(model, prompt, count)


@pytest.fixture
def shifts(monkeypatch):
    """Collects by how many columns the grid is moved."""
    columns, shift_left = [], KVGrid.shift_left

    def spy(self, count):
        columns.append(count)
        shift_left(self, count)

    monkeypatch.setattr(KVGrid, "shift_left", spy)
    return columns


# --- greedy output is model.generate's ---


@pytest.mark.parametrize("make_model", ARCHITECTURES)
async def test_prompts_of_differing_lengths_decode_together_as_alone(make_model):
    await assert_greedy_matches_generate(make_model(), [(prompt_of(length), 16) for length in (1, 8, 3, 5)])


@pytest.mark.parametrize("make_model", ARCHITECTURES)
async def test_requests_that_queue_and_join_later_decode_as_alone(make_model):
    lengths_and_counts = [(3, 5), (8, 14), (1, 9), (6, 3), (8, 12), (2, 7)]
    requests = [(prompt_of(length, i), count) for i, (length, count) in enumerate(lengths_and_counts)]
    await assert_greedy_matches_generate(make_model(), requests, max_rows=2)


async def test_a_longer_prompt_joins_a_running_shorter_one():
    model, reference, late = llama(), llama(), []
    async with serving(model) as engine:

        async def join():
            late.append(await begin(engine.generate(prompt_of(8), greedy(10))))

        at_forward(model, 4, join)
        (early,) = await engine.generate(prompt_of(2), greedy(10))
        (joined,) = await late[0]
    assert early.token_ids.tolist() == greedy_tokens(reference, prompt_of(2), 10)
    assert joined.token_ids.tolist() == greedy_tokens(reference, prompt_of(8), 10)


async def test_a_sliding_window_hides_what_lies_outside_it():
    model, unlimited = sliding_mistral(window=4), sliding_mistral(window=512)
    async with serving(model) as engine:
        (completion,) = await engine.generate(prompt_of(8), greedy(16))
    assert completion.token_ids.tolist() == greedy_tokens(model, prompt_of(8), 16)
    assert completion.token_ids.tolist() != greedy_tokens(unlimited, prompt_of(8), 16)


@pytest.mark.parametrize("make_model", [llama, sliding_mistral])
async def test_decoding_goes_on_unchanged_when_the_columns_run_out(make_model, shifts):
    # Each joins while another runs, so the grid is never empty and has to move.
    requests = [(prompt_of(4, i), count) for i, count in enumerate((100, 60, 90, 80))]
    await assert_greedy_matches_generate(
        make_model(), requests, max_rows=2, max_prompt_tokens=4, max_completion_tokens=100
    )
    assert shifts


async def test_the_columns_may_run_out_at_any_step(monkeypatch, shifts):
    monkeypatch.setattr(batch, "_SLACK_COLUMNS", 1)
    requests = [(prompt_of(1 + i % 8, i), 1 + 7 * i % 12) for i in range(16)]
    await assert_greedy_matches_generate(llama(), requests, max_rows=3, max_completion_tokens=12)
    assert len(shifts) > 2


async def test_a_prefill_in_several_passes_gives_the_same(monkeypatch):
    monkeypatch.setattr(kv_cache, "_PREFILL_TOKENS", 16)
    requests = [(prompt_of(length, length), 8) for length in (8, 2, 5, 8, 1)]
    await assert_greedy_matches_generate(llama(), requests)


async def test_a_read_only_prompt_is_taken_as_it_is():
    prompt = prompt_of(5)
    prompt.flags.writeable = False
    await assert_greedy_matches_generate(llama(), [(prompt, 4)])


# --- sampling ---


@pytest.mark.parametrize("make_model", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.6])
async def test_recorded_logprobs_are_those_of_a_full_forward_pass(make_model, temperature):
    model, prompts = make_model(), [prompt_of(3), prompt_of(8), prompt_of(1)]
    params = SamplingParams(n=3, temperature=temperature, max_tokens=14)
    async with serving(model, max_rows=6) as engine:
        groups = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = full_logprobs(model, prompt, completion, temperature)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


async def test_greedy_tokens_carry_their_logprob_at_temperature_one():
    model = llama()
    async with serving(model) as engine:
        (completion,) = await engine.generate(prompt_of(4), greedy(12))
    np.testing.assert_allclose(completion.logprobs, full_logprobs(model, prompt_of(4), completion), atol=1e-4)


async def test_what_is_sampled_does_not_depend_on_the_company():
    params = SamplingParams(n=2, max_tokens=20, seed=11)
    async with serving(llama()) as engine:
        alone = await engine.generate(prompt_of(5), params)
    async with serving(llama(), max_rows=5) as engine:
        others = [
            SamplingParams(n=3, temperature=0.0, max_tokens=6),
            SamplingParams(n=1, top_k=3, max_tokens=15, seed=4),
            SamplingParams(n=2, top_p=0.5, temperature=2.0, max_tokens=9, seed=5),
        ]
        before = [await begin(engine.generate(prompt_of(8, i), other)) for i, other in enumerate(others)]
        registry = await engine.generate(prompt_of(5), params)
        await asyncio.gather(*before)
    for one, other in zip(alone, registry, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


async def test_the_seed_decides_and_samples_of_a_group_differ():
    async with serving(llama()) as engine:
        first, again, reseeded = [
            await engine.generate(prompt_of(5), SamplingParams(n=4, max_tokens=12, seed=seed)) for seed in (1, 1, 2)
        ]
    texts = [[tuple(completion.token_ids.tolist()) for completion in group] for group in (first, again, reseeded)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 8


async def test_filters_apply_to_each_request_of_a_batch_by_itself():
    model = llama()
    async with serving(model) as engine:
        (filtered,), (free,) = await asyncio.gather(
            engine.generate(prompt_of(5), SamplingParams(top_k=2, max_tokens=30)),
            engine.generate(prompt_of(6), SamplingParams(max_tokens=30)),
        )

    def ranks(prompt, completion):
        logits_TV = full_logits(model, prompt, completion.token_ids)
        chosen_T1 = logits_TV.gather(1, torch.tensor(completion.token_ids)[:, None])
        return (logits_TV > chosen_T1).sum(dim=1)

    assert ranks(prompt_of(5), filtered).max() == 1
    assert ranks(prompt_of(6), free).max() > 1


async def test_a_group_is_prefilled_once():
    model = llama()
    shapes = forward_shapes(model)
    async with serving(model) as engine:
        group = await engine.generate(prompt_of(5), SamplingParams(n=4, max_tokens=3))
        assert engine.stats().tokens == 12
    assert len(group) == 4
    assert shapes == [(1, 5), (4, 1), (4, 1)]


# --- where completions end ---


@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("level", ["engine", "request"])
async def test_a_stop_token_ends_the_completion_and_is_included(position, level):
    model = llama()
    expected = greedy_tokens(model, prompt_of(3), 12)[: position + 1]
    stop = expected[-1]
    assert stop not in expected[:-1]
    engine_stops, request_stops = ((stop,), ()) if level == "engine" else ((1,), (stop,))
    async with serving(model, stop_token_ids=engine_stops) as engine:
        (completion,) = await engine.generate(prompt_of(3), greedy(12, stop_token_ids=request_stops))
    assert completion.token_ids.tolist() == expected
    assert completion.finish_reason == "stop"
    assert completion.logprobs.shape == (position + 1,)
    assert completion.versions == ((0, position + 1),)


async def test_a_stop_token_of_one_request_does_not_stop_another():
    model = llama()
    tokens = greedy_tokens(model, prompt_of(3), 12)
    async with serving(model) as engine:
        (stopped,), (other,) = await asyncio.gather(
            engine.generate(prompt_of(3), greedy(12, stop_token_ids=(tokens[2], tokens[4]))),
            engine.generate(prompt_of(3), greedy(12)),
        )
    assert stopped.token_ids.tolist() == tokens[:3]
    assert other.token_ids.tolist() == tokens


async def test_samples_that_end_at_different_places_come_back_in_order():
    async with serving(llama()) as engine:
        params = SamplingParams(n=6, max_tokens=30, seed=3)
        whole = await engine.generate(prompt_of(4), params)
        stops = tuple(range(0, 79, 8))
        cut = await engine.generate(prompt_of(4), SamplingParams(n=6, max_tokens=30, seed=3, stop_token_ids=stops))
    assert len({len(completion.token_ids) for completion in cut}) > 2
    for full, completion in zip(whole, cut, strict=True):
        length = len(completion.token_ids)
        assert completion.token_ids.tolist() == full.token_ids[:length].tolist()
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in stops)


async def test_the_limit_ends_a_completion_with_reason_length():
    async with serving(llama()) as engine:
        (completion,) = await engine.generate(prompt_of(3), greedy(7))
    assert len(completion.token_ids) == len(completion.logprobs) == 7
    assert completion.finish_reason == "length"


async def test_a_stop_token_at_the_limit_counts_as_stop():
    model = llama()
    tokens = greedy_tokens(model, prompt_of(3), 6)
    async with serving(model, stop_token_ids=(tokens[-1],)) as engine:
        (completion,) = await engine.generate(prompt_of(3), greedy(6))
    assert (completion.token_ids.tolist(), completion.finish_reason) == (tokens, "stop")


async def test_a_limit_of_one_token_needs_the_prefill_only():
    model = llama()
    shapes = forward_shapes(model)
    async with serving(model) as engine:
        group = await engine.generate(prompt_of(6), greedy(1, n=3))
    assert [completion.token_ids.tolist() for completion in group] == [greedy_tokens(model, prompt_of(6), 1)] * 3
    assert shapes[0] == (1, 6)
    assert all(completion.finish_reason == "length" for completion in group)


async def test_the_largest_prompt_and_completion_fit():
    await assert_greedy_matches_generate(
        llama(), [(prompt_of(8), 40)], max_rows=1, max_prompt_tokens=8, max_completion_tokens=40
    )
