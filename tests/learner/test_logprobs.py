from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo.learner import logprobs
from grpo.learner.collate import collate, samples_of
from grpo.learner.logprobs import token_logprobs, token_logprobs_and_entropy

CPU = torch.device("cpu")


@pytest.fixture
def mixed_groups(make_group):
    def make(eos):
        return [
            make_group(2, [6, 1, 3], [1.0, 0.0, -1.0], eos=eos),
            make_group(9, [1], [1.0], seed=1, eos=eos),
            make_group(1, [4, 12], [1.0, -1.0], seed=2, eos=eos),
        ]

    return make


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eos", [1, 0])  # 0 is the pad token
def test_agree_with_one_unpadded_sequence_at_a_time(model, mixed_groups, slow_logprobs, eos, temperature):
    groups = mixed_groups(eos)
    micro = collate([sample for group in groups for sample in samples_of(group)], CPU)
    with torch.no_grad():
        rows_BK = token_logprobs(model, micro, temperature)
        expected = [
            slow_logprobs(model, group.prompt.token_ids, completion.token_ids, temperature)
            for group in groups
            for completion in group.completions
        ]
    assert rows_BK.shape == micro.mask_BK.shape
    for row_K, mask_K, expected_T in zip(rows_BK, micro.mask_BK, expected, strict=True):
        torch.testing.assert_close(row_K[mask_K], expected_T, rtol=0, atol=1e-5)


def test_do_not_depend_on_what_stands_in_padded_places(model, mixed_groups):
    micro = collate([sample for group in mixed_groups(eos=0) for sample in samples_of(group)], CPU)
    spoilt = replace(micro, tokens_BT=micro.tokens_BT.masked_fill(micro.attention_BT == 0, 33))
    assert not torch.equal(spoilt.tokens_BT, micro.tokens_BT)
    with torch.no_grad():
        clean_BK, spoilt_BK = token_logprobs(model, micro, 1.0), token_logprobs(model, spoilt, 1.0)
    assert torch.equal(spoilt_BK[micro.mask_BK], clean_BK[micro.mask_BK])


def test_are_normalized_over_the_vocabulary(model, make_group):
    (sample,) = samples_of(make_group(3, [2], [1.0]))
    micro = collate([sample], CPU)
    total = 0.0
    with torch.no_grad():
        for token in range(model.config.vocab_size):
            micro.tokens_BT[0, -1] = token
            total += float(token_logprobs(model, micro, 0.7)[0, -1].exp())
    assert total == pytest.approx(1, abs=1e-5)


def test_are_float32_under_a_bfloat16_model(model, mixed_groups):
    micro = collate([sample for group in mixed_groups(eos=1) for sample in samples_of(group)], CPU)
    with torch.no_grad():
        exact_BK = token_logprobs(model, micro, 1.0)
        rounded_BK = token_logprobs(model.to(torch.bfloat16), micro, 1.0)
    assert rounded_BK.dtype == torch.float32
    assert float((rounded_BK - exact_BK)[micro.mask_BK].abs().mean()) < 0.2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 700, 1 << 22])
def test_the_entropy_is_that_of_the_distribution_at_the_temperature(
    model, mixed_groups, monkeypatch, temperature, chunk
):
    monkeypatch.setattr(logprobs, "_CHUNK", chunk)
    micro = collate([sample for group in mixed_groups(1) for sample in samples_of(group)], CPU)
    logprobs_BK, entropy_BK = token_logprobs_and_entropy(model, micro, temperature)
    assert torch.equal(logprobs_BK, token_logprobs(model, micro, temperature))
    assert logprobs_BK.requires_grad
    assert not entropy_BK.requires_grad
    with torch.no_grad():
        logits_BTV = model(input_ids=micro.tokens_BT, attention_mask=micro.attention_BT).logits.double() / temperature
    p_BKV = logits_BTV[:, micro.first : -1].softmax(dim=-1)
    expected_BK = -(p_BKV * p_BKV.log()).sum(dim=-1)
    torch.testing.assert_close(entropy_BK.double(), expected_BK, rtol=0, atol=1e-5)


def test_words_that_are_ruled_out_have_no_part_in_the_entropy():
    logits_BKV = torch.tensor([[[0.0, 0.0, -torch.inf], [5.0, -torch.inf, -torch.inf]]])
    entropy_BK = logprobs._entropy(logits_BKV, logits_BKV.logsumexp(dim=-1))
    torch.testing.assert_close(entropy_BK, torch.tensor([[2.0, 1.0]]).log())
