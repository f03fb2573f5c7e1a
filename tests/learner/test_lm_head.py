from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo.learner import lm_head as head_module
from grpo.learner.lm_head import linear_logprobs

N, WIDTH, VOCAB = 9, 6, 37


@pytest.fixture(params=[37, 40, 10, 1], ids=lambda size: f"blocks of {size}")
def block(request, monkeypatch):
    monkeypatch.setattr(head_module, "_CPU_BLOCK", request.param * N)
    monkeypatch.setattr(head_module, "_MIN_VOCAB_BLOCK", 1)
    monkeypatch.setattr(head_module, "_ALIGNMENT", 1)


def make(dtype=torch.float64, *, bias=True, scale=3.0):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight *= scale
    hidden_ND = torch.randn(N, WIDTH, dtype=dtype, requires_grad=True)
    targets_N = torch.tensor([0, 36, 5, 5, 9, 10, 11, 20, 35])
    return hidden_ND, head, targets_N


def slow(hidden_ND, head, targets_N, temperature):
    """In float64, a token at a time."""
    logprobs, entropies = [], []
    for hidden_D, target in zip(hidden_ND.double(), targets_N, strict=True):
        logits_V = head.weight.double() @ hidden_D + (0 if head.bias is None else head.bias.double())
        logprobs_V = (logits_V / temperature).log_softmax(dim=0)
        logprobs.append(logprobs_V[target])
        entropies.append(-(logprobs_V.exp() * logprobs_V).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(logprobs_N, hidden_ND, head):
    weights_N = torch.linspace(-1, 2, N, dtype=logprobs_N.dtype)
    return torch.autograd.grad((weights_N * logprobs_N).sum(), [hidden_ND, *head.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5)])
def test_equal_the_softmax_of_whole_logits_and_so_do_the_gradients(block, dtype, tolerance, temperature, bias):
    inputs = make(dtype, bias=bias)
    logprobs_N, entropy_N = linear_logprobs(*inputs, temperature)
    expected_N, expected_entropy_N = slow(*inputs, temperature)
    assert logprobs_N.dtype == entropy_N.dtype == torch.float32
    assert logprobs_N.requires_grad
    assert not entropy_N.requires_grad
    torch.testing.assert_close(logprobs_N.double(), expected_N, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy_N.double(), expected_entropy_N, rtol=0, atol=tolerance)
    found, expected = gradients(logprobs_N, *inputs[:2]), gradients(expected_N, *inputs[:2])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_far_logits_do_not_overflow(block):
    hidden_ND, head, targets_N = make(scale=300.0)
    logprobs_N, entropy_N = linear_logprobs(hidden_ND, head, targets_N, 1.0)
    expected_N, _ = slow(hidden_ND, head, targets_N, 1.0)
    torch.testing.assert_close(logprobs_N.double(), expected_N, rtol=1e-5, atol=1e-3)
    assert torch.isfinite(entropy_N).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(logprobs_N, hidden_ND, head))


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do(block):
    hidden_ND, head, targets_N = make()
    free = gradients(linear_logprobs(hidden_ND, head, targets_N, 1.0)[0], hidden_ND, head)
    head.requires_grad_(False)
    linear_logprobs(hidden_ND, head, targets_N, 1.0)[0].mul(torch.linspace(-1, 2, N)).sum().backward()
    assert head.weight.grad is None
    torch.testing.assert_close(hidden_ND.grad, free[0])


def test_under_autocast_products_are_rounded_and_sums_are_not(block):
    hidden_ND, head, targets_N = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs_N, entropy_N = linear_logprobs(hidden_ND, head, targets_N, 1.0)
        logits_NV = head(hidden_ND)
    assert logits_NV.dtype == torch.bfloat16
    expected_NV = logits_NV.float().log_softmax(dim=-1)
    expected_N = expected_NV.gather(1, targets_N[:, None])[:, 0]
    torch.testing.assert_close(logprobs_N, expected_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy_N, -(expected_NV.exp() * expected_NV).sum(dim=1), rtol=0, atol=1e-5)
    for a, b in zip(gradients(logprobs_N, hidden_ND, head), gradients(expected_N, hidden_ND, head), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02
