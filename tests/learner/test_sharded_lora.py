"""Adapters on several ranks against one: gradients, published adapters and the model as its own reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from learner_parts import make_group, make_learner, peaked

from grpo.config.actors import LoraConfig
from grpo.models.lora import adapters_off, add_adapters
from grpo.models.tiny import tiny_llama
from grpo.types import Batch


def batch(version):
    return Batch(
        [
            make_group(4, [6, 1, 3], [1.2, -0.7, -0.5], seed=1, version=version),
            make_group(7, [2, 20, 3], [0.0, 0.9, -0.9], seed=3, version=version),
            make_group(1, [1, 2], [0.5, -0.5], seed=4, version=version),
        ]
    )


def steps(ranks, dtype, settings, count=3):
    """Metrics by step, and what rank 0 publishes then."""
    model = peaked(tiny_llama(width=32, layers=2, heads=2)).to(dtype)
    add_adapters(model, LoraConfig(rank=4, alpha=8.0))
    learner = make_learner(
        model, ranks=ranks, dtype=dtype, beta=0.5, as_reference=partial(adapters_off, model), lr=1e-2, **settings
    )
    return [learner.train_step(batch(version)) for version in range(count)], learner.weights()


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 12}, {"gradient_checkpointing": True}], ids=str)
def test_ranks_train_the_adapters_of_one(rank_processes, settings):
    expected, weights = steps(None, torch.float32, settings)
    assert expected[0]["trainer/reference_kl"] == 0 < expected[2]["trainer/reference_kl"]
    for size in (2, 3):
        answers = rank_processes.run(size, steps, torch.float32, settings)
        for metrics, _ in answers:
            for found, one in zip(metrics, expected, strict=True):
                assert found == pytest.approx(one, rel=1e-3, abs=1e-5)
        published = answers[0][1]
        assert published.specs == weights.specs
        for (name, found), (_, one) in zip(published.tensors(), weights.tensors(), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-4, msg=name)


def test_a_base_of_16_bits_is_trained_beside_adapters_of_32(rank_processes):
    [(expected, _), *_] = [steps(None, torch.bfloat16, {})]
    for metrics, _ in rank_processes.run(2, steps, torch.bfloat16, {}):
        assert metrics[0]["trainer/reference_kl"] == 0
        assert metrics[2]["trainer/reference_kl"] > 0
        assert metrics[0]["trainer/grad_norm"] == pytest.approx(expected[0]["trainer/grad_norm"], rel=0.05)
