"""Log-probabilities of given tokens under a model, for the trainer and the reference. V is the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from grpo.learner.collate import MicroBatch, Sample, collate, plan
from grpo.types import Floats

if TYPE_CHECKING:  # the module behind it takes a second to import
    from transformers import PreTrainedModel

_CHUNK = 1 << 22  # logits of which the entropy is computed at a time, to bound the memory


def token_logprobs(model: PreTrainedModel, micro: MicroBatch, temperature: float) -> Tensor:
    """float32 [B, K]: the log-probability of each predicted token at the temperature it was sampled with.

    Only the columns that predict completion tokens go through the vocabulary. Masked places hold arbitrary numbers.
    """
    logits_BKV = token_logits(model, micro, temperature)
    return _picked(logits_BKV, logits_BKV.logsumexp(dim=-1), micro)


def token_logprobs_and_entropy(model: PreTrainedModel, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, and the entropy of each of those distributions in nats, float32 [B, K], without gradient."""
    logits_BKV = token_logits(model, micro, temperature)
    normalizer_BK = logits_BKV.logsumexp(dim=-1)
    return _picked(logits_BKV, normalizer_BK, micro), _entropy(logits_BKV, normalizer_BK)


@torch.no_grad()
def sample_logprobs(
    model: PreTrainedModel, samples: Sequence[Sample], temperature: float, max_tokens: int
) -> list[Floats]:
    """float32 [T] for each completion, computed in micro-batches of at most `max_tokens` padded tokens."""
    results: list[Floats] = [np.empty(0, np.float32)] * len(samples)
    for part in plan([len(sample) for sample in samples], max_tokens):
        micro = collate([samples[i] for i in part], model.device)
        logprobs_BK, mask_BK = token_logprobs(model, micro, temperature).cpu(), micro.mask_BK.cpu()
        for i, logprobs_K, mask_K in zip(part, logprobs_BK, mask_BK, strict=True):
            results[i] = logprobs_K[mask_K].numpy()
    return results


def token_logits(model: PreTrainedModel, micro: MicroBatch, temperature: float) -> Tensor:
    """float32 [B, K, V], divided by the temperature."""
    columns_K = torch.arange(micro.first, micro.tokens_BT.shape[1] - 1, device=micro.tokens_BT.device)
    logits_BKV = model(
        input_ids=micro.tokens_BT,
        attention_mask=micro.attention_BT,
        use_cache=False,
        logits_to_keep=columns_K,
    ).logits
    return logits_BKV.float() / temperature


def _picked(logits_BKV: Tensor, normalizer_BK: Tensor, micro: MicroBatch) -> Tensor:
    targets_BK = micro.tokens_BT[:, micro.first + 1 :]
    return logits_BKV.gather(-1, targets_BK[..., None])[..., 0] - normalizer_BK


@torch.no_grad()
def _entropy(logits_BKV: Tensor, normalizer_BK: Tensor) -> Tensor:
    """The normalizer minus the mean logit; a logit of minus infinity has no part in it."""
    flat_NV, normalizer_N1 = logits_BKV.flatten(0, 1), normalizer_BK.flatten()[:, None]
    rows = max(1, _CHUNK // flat_NV.shape[1])
    means = []
    for part_NV, normalizer_n1 in zip(flat_NV.split(rows), normalizer_N1.split(rows), strict=True):
        p_NV = (part_NV - normalizer_n1).exp()
        means.append((p_NV * part_NV).masked_fill(p_NV == 0, 0.0).sum(dim=-1))
    return normalizer_BK - torch.cat(means).view(normalizer_BK.shape)
