from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.actors.reference import Reference
from grpo.learner.batch import make_sample
from grpo.learner.logprobs import TokenLogprobs
from grpo.models.loading import load_model


@pytest.fixture
def make_reference(config):
    opened = []

    async def make(*, temperature=1.0, micro_batch_tokens=16384):
        reference = Reference(
            replace(
                config,
                rollout=replace(config.rollout, temperature=temperature),
                reference=replace(config.reference, micro_batch_tokens=micro_batch_tokens),
            )
        )
        await reference.setup()
        opened.append(reference)
        return reference

    yield make
    for reference in opened:
        reference._thread.close()


@pytest.fixture
def completions(answers):
    return answers("", "abcdefgh", "abc", "ab")


@pytest.mark.parametrize(("temperature", "effective"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
async def test_equal_the_learners_on_the_same_weights(
    config, make_reference, prompt, completions, temperature, effective
):
    reference = await make_reference(temperature=temperature)
    found, _ = await reference.logprobs(prompt, completions)
    model = load_model(config.model, torch.float32, "cpu")
    samples = [make_sample(prompt.token_ids, completion) for completion in completions]
    with torch.no_grad():
        learners_N, _ = TokenLogprobs(model.train(), effective)(samples)
    assert {logprobs_T.dtype for logprobs_T in found} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.concatenate(found), learners_N.numpy(), rtol=0, atol=1e-6)


async def test_come_in_the_order_and_length_of_the_completions(make_reference, prompt, completions):
    reference = await make_reference()
    found, _ = await reference.logprobs(prompt, completions)
    assert [len(logprobs) for logprobs in found] == [len(completion.token_ids) for completion in completions]


async def test_who_shares_the_batch_does_not_matter(make_reference, prompt, completions):
    together, _ = await (await make_reference()).logprobs(prompt, completions)
    in_parts, _ = await (await make_reference(micro_batch_tokens=20)).logprobs(prompt, completions)
    reference = await make_reference()
    alone = [(await reference.logprobs(prompt, [completion]))[0][0] for completion in completions]
    for others in (in_parts, alone):
        for a, b in zip(together, others, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


async def test_no_completions_give_no_logprobs(make_reference, prompt):
    assert await (await make_reference()).logprobs(prompt, []) == ([], None)
