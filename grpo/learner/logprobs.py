"""Log-probabilities of completions under a model, for the trainer and the reference. V is the vocabulary size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from grpo.learner.batch import Sample
from grpo.learner.lm_head import linear_logprobs
from grpo.types import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 22  # logits per chunk of the entropy, to bound its memory
log = logging.getLogger(__name__)


class TokenLogprobs:
    """Log-probabilities and entropies of completions, at the temperature that they were sampled with.

    With `packing` "auto" the samples of a micro-batch share one row if the model gives the same logits that way, else
    they are padded and the reason is logged. With "never" they are always padded.

    Example:
        logprobs = TokenLogprobs(model, temperature=1.0)
        for part in logprobs.plan(samples, max_tokens=4096):
            logprobs_N, entropy_N = logprobs([samples[i] for i in part])
    """

    def __init__(self, model: PreTrainedModel, temperature: float, packing: str = "auto") -> None:
        from grpo.learner.layouts import choose_layout, find_linear_head  # imports transformers

        self._model, self._temperature = model, temperature
        self._layout, why_padded = choose_layout(model, packing)
        self._head = find_linear_head(model)
        if why_padded:
            log.warning("%s runs on padded rows: %s", type(model).__name__, why_padded)

    def plan(self, samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
        """Split samples, by index, into micro-batches of at most `max_tokens` tokens each; see Layout."""
        return self._layout.plan(samples, max_tokens)

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """float32 [N]: log-probabilities of all sampled tokens, sample after sample, and entropies in nats.

        The entropy is of the whole distribution that a token was drawn from, and has no gradient.
        """
        inputs = self._layout.lay_out(samples, self._model.device)
        if self._head is None:
            output = self._model(**inputs.arguments, use_cache=False, logits_to_keep=inputs.columns_K)
            logits_NV = output.logits.flatten(0, 1)[inputs.places_N].float() / self._temperature
            return logits_logprobs(logits_NV, inputs.targets_N)
        hidden_RTD = self._model.base_model(**inputs.arguments, use_cache=False).last_hidden_state
        hidden_ND = hidden_RTD[:, inputs.columns_K].flatten(0, 1)[inputs.places_N]
        return linear_logprobs(hidden_ND, self._head, inputs.targets_N, self._temperature)

    @torch.no_grad()
    def of_samples(self, samples: Sequence[Sample], max_tokens: int) -> list[Floats]:
        """float32 [N] for each completion, computed in micro-batches of at most `max_tokens`."""
        results: list[Floats] = [np.empty(0, np.float32)] * len(samples)
        for part in self.plan(samples, max_tokens):
            logprobs_N, _ = self([samples[i] for i in part])
            ends = np.cumsum([samples[i].sampled_count for i in part])
            for i, logprobs in zip(part, np.split(logprobs_N.cpu().numpy(), ends[:-1]), strict=True):
                results[i] = logprobs
        return results


def logits_logprobs(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Like lm_head.linear_logprobs, from whole logits, which may include minus infinity."""
    normalizer_N = logits_NV.logsumexp(dim=-1)
    target_N = logits_NV.gather(-1, targets_N[:, None])[:, 0]
    return target_N - normalizer_N, _entropy(logits_NV, normalizer_N)


@torch.no_grad()
def _entropy(logits_NV: Tensor, normalizer_N: Tensor) -> Tensor:
    """Return the normalizer minus the mean logit; logits of minus infinity are left out."""
    rows = max(1, _CHUNK // logits_NV.shape[1])
    means = []
    for part_NV, normalizer_n in zip(logits_NV.split(rows), normalizer_N.split(rows), strict=True):
        p_NV = (part_NV - normalizer_n[:, None]).exp()
        means.append((p_NV * part_NV).masked_fill(p_NV == 0, 0.0).sum(dim=-1))
    return normalizer_N - torch.cat(means)
