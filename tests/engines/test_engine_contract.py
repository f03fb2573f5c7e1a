"""What every engine promises. `make test` holds the torch engine to it, `make test-vllm` vLLM."""

import asyncio
import dataclasses

import numpy as np
import pytest
import pytest_asyncio
import torch
from contract_helpers import EOS, opened, tied_llama, untied_qwen2
from engine_helpers import chosen_logprobs, full_logits, full_logprobs, greedy, greedy_tokens, prompt_of, weights_of

from grpo.engines.base import Limits
from grpo.errors import WeightsError
from grpo.learner.batch import make_sample
from grpo.learner.logprobs import TokenLogprobs
from grpo.types import SamplingParams

LIMITS = Limits(max_prompt_tokens=300, max_completion_tokens=200, max_sequences=16)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        (tied_llama, "in_flight"),
        (tied_llama, "in_flight_recompute"),
        (untied_qwen2, "in_flight_recompute"),
        (tied_llama, "drain"),
    ],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
async def served(request, tmp_path_factory):
    kind = request.config.getoption("--engine")
    async with opened(kind, *request.param, LIMITS, tmp_path_factory.mktemp("served")) as bench:
        yield bench


@pytest_asyncio.fixture(loop_scope="module")
async def bench(served):
    """The engine with the weights of seed 1; shared by the tests of this file, for vLLM takes ten seconds to start."""
    async with asyncio.timeout(600):
        await served.load(seed=1)
        yield served


def trainer_logprobs(model, prompt, completion, temperature):
    (found,) = TokenLogprobs(model, temperature).of_samples([make_sample(prompt, completion)], max_tokens=1)
    return found


# --- what comes out ---


async def test_greedy_completions_are_those_of_generate(bench):
    model = bench.model(seed=1)
    prompts = [prompt_of(length) for length in (1, 7, 40, 300)]
    groups = await asyncio.gather(*(bench.engine.generate(prompt, greedy(20)) for prompt in prompts))
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        expected = greedy_tokens(model, prompt, 20)
        expected = expected[: expected.index(EOS) + 1] if EOS in expected else expected
        assert completion.token_ids.tolist() == expected


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
async def test_logprobs_are_the_trainers(bench, temperature):
    model, prompt = bench.model(seed=1), prompt_of(9)
    group = await bench.engine.generate(prompt, SamplingParams(n=4, temperature=temperature, max_tokens=30))
    for completion in group:
        expected = trainer_logprobs(model, prompt, completion, temperature)
        assert completion.logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)


async def test_logprobs_are_of_the_filtered_distribution(bench):
    model, prompt = bench.model(seed=1), prompt_of(9)
    (completion,) = await bench.engine.generate(prompt, SamplingParams(top_k=3, max_tokens=30))
    logits_TV = full_logits(model, prompt, completion.token_ids)
    outside_TV = logits_TV < logits_TV.topk(3).values[:, -1:]
    expected = chosen_logprobs(logits_TV.masked_fill(outside_TV, -torch.inf), completion.token_ids)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)


async def test_a_group_has_n_different_completions(bench):
    group = await bench.engine.generate(prompt_of(5), SamplingParams(n=6, max_tokens=30))
    assert len({tuple(completion.token_ids.tolist()) for completion in group}) == 6


async def test_greedy_groups_repeat_one_completion(bench):
    group = await bench.engine.generate(prompt_of(5), greedy(10, n=3))
    assert [completion.token_ids.tolist() for completion in group] == [group[0].token_ids.tolist()] * 3


async def test_the_seed_decides(bench):
    first, again, other = [
        await bench.engine.generate(prompt_of(5), SamplingParams(n=2, max_tokens=20, seed=seed)) for seed in (3, 3, 4)
    ]
    ids = [[completion.token_ids.tolist() for completion in group] for group in (first, again, other)]
    assert ids[0] == ids[1]
    assert ids[0][0] != ids[2][0]
    assert ids[0][1] != ids[2][0]  # sample i + 1 of one seed is not sample i of the next


async def test_stop_tokens_end_a_completion_and_are_included(bench):
    model, prompt = bench.model(seed=1), prompt_of(5)
    tokens = greedy_tokens(model, prompt, 12)
    position = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    (completion,) = await bench.engine.generate(prompt, greedy(12, stop_token_ids=(tokens[position],)))
    assert completion.token_ids.tolist() == tokens[: position + 1]
    assert completion.finish_reason == "stop"
    assert len(completion.logprobs) == position + 1


async def test_the_models_own_end_of_sequence_stops_too(bench):
    group = await bench.engine.generate(prompt_of(5), SamplingParams(n=16, max_tokens=200, temperature=2.0))
    assert any(completion.finish_reason == "stop" for completion in group)
    for completion in group:
        ids = completion.token_ids.tolist()
        assert EOS not in ids[:-1]
        assert (completion.finish_reason == "stop") == (ids[-1] == EOS)


async def test_the_limit_ends_a_completion(bench):
    (completion,) = await bench.engine.generate(prompt_of(5), SamplingParams(max_tokens=1))
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


async def test_more_than_fits_at_once_waits_its_turn(bench):
    groups = await asyncio.gather(
        *(bench.engine.generate(prompt_of(4, i), SamplingParams(n=6, max_tokens=12)) for i in range(7))
    )
    assert [len(group) for group in groups] == [6] * 7


async def test_many_long_prompts_at_once_are_answered(bench):
    prompts = [prompt_of(300 - i, i) for i in range(32)]
    groups = await asyncio.gather(*(bench.engine.generate(p, SamplingParams(max_tokens=4, seed=7)) for p in prompts))
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        np.testing.assert_allclose(
            completion.logprobs, full_logprobs(bench.model(seed=1), prompt, completion), atol=1e-3
        )


# --- new weights ---


async def test_an_update_takes_effect_on_tokens_and_logprobs(bench):
    new = await bench.load(seed=2)
    (best,) = await bench.engine.generate(prompt_of(8), greedy(20))
    sampled = await bench.engine.generate(prompt_of(8), SamplingParams(n=2, max_tokens=20))
    assert best.token_ids.tolist() == greedy_tokens(new, prompt_of(8), len(best.token_ids))
    for completion in sampled:
        assert completion.versions == ((bench.engine.version, len(completion.token_ids)),)
        np.testing.assert_allclose(completion.logprobs, full_logprobs(new, prompt_of(8), completion), atol=1e-3)


async def test_a_prompt_seen_before_is_read_anew_by_new_weights(bench):
    prompt = prompt_of(300)
    await bench.engine.generate(prompt, greedy(4))
    new = await bench.load(seed=3)
    (completion,) = await bench.engine.generate(prompt, SamplingParams(max_tokens=12))
    np.testing.assert_allclose(completion.logprobs, full_logprobs(new, prompt, completion), atol=1e-3)


async def test_a_prompt_that_waited_through_an_update_is_read_by_the_new_weights(bench):
    prompt = prompt_of(300)
    for seed in (3, 2) * 10:
        before = bench.engine.version
        await bench.engine.generate(prompt, greedy(4))
        weights = bench.prepare(seed)
        running = asyncio.create_task(bench.engine.generate(prompt_of(4), SamplingParams(n=16, max_tokens=200)))
        waiting = asyncio.create_task(bench.engine.generate(prompt, SamplingParams(max_tokens=12)))
        await asyncio.sleep(0)
        await bench.engine.update_weights(weights)
        await running
        (completion,) = await waiting
        if completion.versions != ((before, len(completion.token_ids)),):
            break  # otherwise those running had ended before the new weights came: a busy machine
    assert completion.versions == ((bench.engine.version, len(completion.token_ids)),)
    expected = full_logprobs(bench.used[bench.engine.version], prompt, completion)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)


async def test_each_token_knows_the_weights_that_sampled_it(bench):
    prompt, before = prompt_of(6), bench.engine.version
    params = SamplingParams(n=6, max_tokens=200)
    running = asyncio.create_task(bench.engine.generate(prompt, params))
    while not running.done() and bench.engine.version < before + 6:
        await bench.load(seed=bench.engine.version % 3 + 1)
    group = await running
    assert bench.weight_update == "drain" or max(len(completion.versions) for completion in group) > 1
    for completion in group:
        versions = [version for version, _ in completion.versions]
        assert versions == sorted(set(versions))
        assert sum(tokens for _, tokens in completion.versions) == len(completion.token_ids)
        check_spans(bench, prompt, completion)
    (later,) = await bench.engine.generate(prompt, greedy(3))
    assert later.versions == ((bench.engine.version, 3),)


def check_spans(bench, prompt, completion):
    """Every span's log-probabilities against a full forward pass of the weights it names."""
    assert bench.weight_update != "drain" or len(completion.versions) == 1
    begin = 0
    for i, (version, tokens) in enumerate(completion.versions):
        span = slice(begin, begin + tokens)
        gap = np.abs(completion.logprobs - full_logprobs(bench.used[version], prompt, completion))[span]
        if i == 0 or bench.weight_update == "in_flight_recompute":
            assert gap.max() < 1e-3
        elif tokens > 5:
            assert gap.max() > 1e-2  # keys and values of older weights are still in use
        begin += tokens


def renamed(weights):
    first, *rest = weights.specs
    return dataclasses.replace(weights, specs=(dataclasses.replace(first, name="model.other"), *rest))


def incomplete(weights):
    return dataclasses.replace(weights, specs=weights.specs[:-1])


def damaged(weights):
    weights.buffer[7] ^= 1
    return weights


@pytest.mark.parametrize(
    ("spoil", "message"), [(renamed, "does not fit"), (incomplete, "does not fit"), (damaged, "was damaged on its way")]
)
async def test_weights_that_can_not_be_used_are_refused_and_the_old_ones_stay(bench, spoil, message):
    version = bench.engine.version
    with pytest.raises(WeightsError, match=message):
        await bench.engine.update_weights(spoil(weights_of(bench.model(seed=2), version + 1)))
    (completion,) = await bench.engine.generate(prompt_of(5), greedy(8))
    assert completion.versions == ((version, 8),)
    assert completion.token_ids.tolist() == greedy_tokens(bench.model(seed=1), prompt_of(5), 8)


async def test_giving_up_on_an_update_leaves_the_engine_running(bench):
    version = bench.engine.version
    bench.used[version + 1] = bench.model(seed=2)
    update = asyncio.create_task(bench.engine.update_weights(weights_of(bench.used[version + 1], version + 1)))
    await asyncio.sleep(0)
    update.cancel()
    await asyncio.gather(update, return_exceptions=True)
    (completion,) = await bench.engine.generate(prompt_of(5), greedy(8))
    assert len(completion.token_ids) == 8
    await bench.load(seed=1)


# --- requests that end early ---


async def test_cancelling_frees_the_place_for_others(bench):
    calls = [
        asyncio.create_task(bench.engine.generate(prompt_of(4, i), SamplingParams(n=16, max_tokens=200)))
        for i in range(3)
    ]
    await asyncio.sleep(0.05)
    for call in calls:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    (completion,) = await bench.engine.generate(prompt_of(5), greedy(8))
    assert completion.token_ids.tolist() == greedy_tokens(bench.model(seed=1), prompt_of(5), 8)


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
        (0, {}, "prompt_tokens=0"),
        (301, {}, "prompt_tokens=301 must be 1 to 300"),
        (4, {"n": 17}, "n=17"),
        (4, {"n": 0}, "n=0"),
        (4, {"count": 201}, "max_tokens=201 must be 1 to 200"),
        (4, {"count": 0}, "max_tokens=0"),
    ],
)
async def test_a_bad_request_is_refused_and_the_engine_goes_on(bench, length, settings, message):
    with pytest.raises(ValueError, match=message):
        await bench.engine.generate(prompt_of(length), greedy(**{"count": 4, **settings}))
    (completion,) = await bench.engine.generate(prompt_of(5), greedy(8))
    assert len(completion.token_ids) == 8


async def test_tokens_and_busy_time_are_counted(bench):
    before = bench.engine.stats()
    await bench.engine.generate(prompt_of(5), SamplingParams(n=2, max_tokens=1))
    after = bench.engine.stats()
    assert after.tokens - before.tokens == 2
    assert after.busy_s > before.busy_s


# --- the end ---


async def test_it_answers_a_ping_while_it_generates(bench):
    call = asyncio.create_task(bench.engine.generate(prompt_of(6), SamplingParams(n=4, max_tokens=16)))
    await asyncio.wait_for(bench.engine.ping(), 120)
    assert len(await call) == 4


async def test_closing_raises_at_every_pending_call(request, tmp_path):
    kind = request.config.getoption("--engine")
    async with asyncio.timeout(600), opened(kind, tied_llama, "drain", LIMITS, tmp_path) as own:
        calls = [
            asyncio.create_task(own.engine.generate(prompt_of(4), SamplingParams(n=16, max_tokens=200)))
            for _ in range(2)
        ]
        await asyncio.sleep(0.05)
        await own.engine.close()
        for call in calls:
            with pytest.raises(RuntimeError, match="the engine was closed"):
                await call
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await own.engine.generate(prompt_of(4), greedy(2))
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await own.engine.update_weights(weights_of(tied_llama(1), 1))
        await own.engine.close()  # a second time is no error
