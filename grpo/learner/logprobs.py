"""Log-probabilities of given tokens under a model, shared by the trainer and the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.learner.collate import MicroBatch


def token_logprobs(model: PreTrainedModel, micro: MicroBatch, temperature: float) -> Tensor:
    """float32 [B, K]: the log-probability of each predicted token at the temperature it was sampled with.

    Only the columns that predict completion tokens go through the vocabulary. Masked places hold arbitrary numbers.
    """
    columns_K = torch.arange(micro.first, micro.tokens_BT.shape[1] - 1, device=micro.tokens_BT.device)
    logits_BKV = model(
        input_ids=micro.tokens_BT,
        attention_mask=micro.attention_BT,
        use_cache=False,
        logits_to_keep=columns_K,
    ).logits
    targets_BK = micro.tokens_BT[:, micro.first + 1 :]
    scaled_BKV = logits_BKV.float() / temperature
    picked_BK = scaled_BKV.gather(-1, targets_BK[..., None])[..., 0]
    return picked_BK - scaled_BKV.logsumexp(dim=-1)
