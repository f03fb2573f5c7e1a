from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    Qwen3Config,
)

from grpo.learner import logprobs
from grpo.learner.batch import samples_of
from grpo.learner.layouts import PackedLayout, PaddedLayout
from grpo.learner.logprobs import TokenLogprobs, logits_logprobs

SMALL = {
    "vocab_size": 79, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# A model, the layout it gets, whether its logits are what its head gives, and what the log says.
MODELS = {
    "qwen3": (Qwen3Config(**SMALL, head_dim=8), PackedLayout, True, ""),
    "gpt2": (
        GPT2Config(vocab_size=79, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1),
        PackedLayout,
        True,
        "",
    ),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.25), PackedLayout, False, ""),
    "mistral": (MistralConfig(**SMALL, sliding_window=4), PaddedLayout, True, "slid"),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8, sliding_window=4), PaddedLayout, False, "sliding_attention"),
    "bloom": (BloomConfig(vocab_size=79, hidden_size=32, n_layer=2, n_head=4), PaddedLayout, True, "not sdpa"),
}
PACKINGS = pytest.mark.parametrize("packing", ["auto", "never"])


@pytest.fixture
def mixed_groups(make_group):
    """One-token completions, a group of one, a prompt of one token, and the same prompt in two groups."""

    def make(eos=1):
        return [
            make_group(2, [6, 1, 3], [1.0, 0.0, -1.0], eos=eos),
            make_group(9, [1], [1.0], seed=1, eos=eos),
            make_group(1, [4, 12], [1.0, -1.0], seed=2, eos=eos),
            make_group(2, [5], [1.0], eos=eos),
        ]

    return make


def samples_in(groups):
    return [sample for group in groups for sample in samples_of(group)]


def slow(model, groups, slow_logprobs, temperature):
    """float64 [N] with gradient: one completion after another."""
    return torch.cat(
        [
            slow_logprobs(model, group.prompt.token_ids, completion.token_ids, temperature)
            for group in groups
            for completion in group.completions
        ]
    )


@PACKINGS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eos", [1, 0])  # 0 is the pad token
def test_agree_with_one_unpadded_sequence_at_a_time(model, mixed_groups, slow_logprobs, eos, temperature, packing):
    groups = mixed_groups(eos)
    with torch.no_grad():
        expected_N = slow(copy.deepcopy(model).double(), groups, slow_logprobs, temperature)
        found_N, _ = TokenLogprobs(model, temperature, packing)(samples_in(groups))
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N.double(), expected_N, rtol=0, atol=1e-5)


@PACKINGS
def test_of_samples_are_the_same_in_any_micro_batches_and_come_in_order(model, mixed_groups, slow_logprobs, packing):
    groups = mixed_groups()
    samples = samples_in(groups)
    with torch.no_grad():
        expected_N = slow(model, groups, slow_logprobs, 1.0).numpy()
    for max_tokens in (1, 12, 24, 1000):
        found = TokenLogprobs(model, 1.0, packing).of_samples(samples, max_tokens)
        assert [len(found_T) for found_T in found] == [len(sample.token_ids) for sample in samples]
        np.testing.assert_allclose(np.concatenate(found), expected_N, rtol=0, atol=1e-5)
    assert TokenLogprobs(model, 1.0, packing).of_samples([], 10) == []


@PACKINGS
@pytest.mark.parametrize(("config", "layout", "plain", "said"), MODELS.values(), ids=MODELS)
def test_any_model_gives_the_logprobs_and_gradients_of_one_sequence_at_a_time(
    config, layout, plain, said, mixed_groups, slow_logprobs, packing, caplog
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    slow_model, groups = copy.deepcopy(model).double(), mixed_groups()
    found = TokenLogprobs(model, 0.7, packing)
    assert type(found._layout) is (layout if packing == "auto" else PaddedLayout)
    assert (found._head is not None) == plain
    assert (said in caplog.text) if packing == "auto" and said else not caplog.records
    logprobs_N, _ = found(samples_in(groups))
    expected_N = slow(slow_model, groups, slow_logprobs, 0.7)
    torch.testing.assert_close(logprobs_N.double(), expected_N, rtol=0, atol=1e-4)
    weights_N = torch.linspace(-1, 2, len(logprobs_N))
    (weights_N * logprobs_N).sum().backward()
    (weights_N * expected_N).sum().backward()
    scale = max(float(parameter.grad.abs().max()) for parameter in slow_model.parameters())
    for (name, parameter), expected in zip(model.named_parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_a_model_that_does_not_tell_its_attention_what_is_packed_gets_padded_rows(model, mixed_groups, caplog):
    attend = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, packed_rows=None, **kwargs: attend(*args, **kwargs)
    assert type(TokenLogprobs(model, 1.0)._layout) is PaddedLayout
    assert "logits of packed rows are off by" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def test_who_shares_the_row_does_not_matter(model, mixed_groups, make_group):
    found, others = TokenLogprobs(model, 1.0), samples_in(mixed_groups())
    samples = samples_of(make_group(4, [5, 3], [1.0, -1.0], seed=5))
    with torch.no_grad():
        alone_N, among_N = found(samples)[0], found([*others, *samples])[0][-8:]
    torch.testing.assert_close(among_N, alone_N, rtol=0, atol=1e-6)


def test_are_float32_under_a_bfloat16_model(model, mixed_groups):
    samples = samples_in(mixed_groups())
    with torch.no_grad():
        exact_N, _ = TokenLogprobs(model, 1.0)(samples)
        found = TokenLogprobs(model.to(torch.bfloat16), 1.0)
        rounded_N, _ = found(samples)
    assert type(found._layout) is PackedLayout
    assert rounded_N.dtype == torch.float32
    assert float((rounded_N - exact_N).abs().mean()) < 0.2


@PACKINGS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_is_that_of_the_distribution_at_the_temperature(model, mixed_groups, temperature, packing):
    groups = mixed_groups()
    logprobs_N, entropy_N = TokenLogprobs(model, temperature, packing)(samples_in(groups))
    assert logprobs_N.requires_grad
    assert not entropy_N.requires_grad
    expected = []
    for group in groups:
        for completion in group.completions:
            ids_1T = torch.tensor(np.concatenate([group.prompt.token_ids, completion.token_ids]))[None]
            p_TV = (model(ids_1T).logits[0, len(group.prompt.token_ids) - 1 : -1].double() / temperature).softmax(-1)
            expected.append(-(p_TV * p_TV.log()).sum(dim=-1))
    torch.testing.assert_close(entropy_N.double(), torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 14, 1 << 22])
def test_words_that_are_ruled_out_have_no_part_in_the_entropy(monkeypatch, chunk):
    monkeypatch.setattr(logprobs, "_CHUNK", chunk)
    logits_NV = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, -torch.inf, -torch.inf]] * 3)
    logprobs_N, entropy_N = logits_logprobs(logits_NV, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(entropy_N, torch.tensor([2.0, 1.0] * 3).log())
    torch.testing.assert_close(logprobs_N, -torch.tensor([2.0, 1.0] * 3).log())
