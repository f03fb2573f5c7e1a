"""What a model allows: rows with several samples, and log-probabilities without whole logits. Both are tried out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.full_attention import why_not_full_attention, why_other_logits
from grpo.learner.attention import PACKED_ATTENTION
from grpo.learner.collate import Sample
from grpo.learner.layout import Layout
from grpo.learner.packing import PACKED
from grpo.learner.padding import PADDED


def layout_for(model: PreTrainedModel, packing: str) -> tuple[Layout, str | None]:
    """The layout, and why it is padded though it need not be. May change the model's attention function."""
    if packing == "never":
        return PADDED, None
    if reason := why_not_full_attention(model, ("sdpa", PACKED_ATTENTION)):
        return PADDED, reason
    usual = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    if (reason := _differs(model)) is None:
        return PACKED, None
    model.set_attn_implementation(usual)
    return PADDED, reason


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The model's head, if its logits are that head's output, and its last hidden states that head's input."""
    head, seen = model.get_output_embeddings(), list[Tensor]()
    if not isinstance(head, nn.Linear):
        return None
    planted_V = torch.linspace(-100, 100, head.out_features)  # what caps or scales logits would change these

    def plant(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(args[0])
        return planted_V.to(output).expand_as(output)

    tokens_1T = torch.arange(4, device=model.device)[None] % head.out_features
    hook = head.register_forward_hook(plant)
    try:
        with torch.no_grad():
            logits_1TV = model(input_ids=tokens_1T, use_cache=False).logits
            hidden_1TD = model.base_model(input_ids=tokens_1T, use_cache=False)[0]
    finally:
        hook.remove()
    same_logits = torch.equal(logits_1TV[0, 0], planted_V.to(logits_1TV))
    same_hidden = seen[0].shape == hidden_1TD.shape and torch.allclose(seen[0], hidden_1TD)
    return head if same_logits and same_hidden else None


def _differs(model: PreTrainedModel) -> str | None:
    """Whether logits of two prompts with two completions each are others when they share a row."""
    rng, words = np.random.default_rng(0), model.config.get_text_config().vocab_size
    prompts = [rng.integers(words, size=length) for length in (5, 3)]
    samples = [
        Sample(prompt_ids=prompt, token_ids=tokens, behavior_logprobs=np.zeros(4, np.float32), versions=tokens)
        for prompt in prompts
        for tokens in rng.integers(words, size=(2, 4))
    ]
    try:
        packed_NV, padded_NV = (_logits(model, layout, samples) for layout in (PACKED, PADDED))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"a packed row fails: {type(error).__name__}: {error}".partition("\n")[0]
    reason = why_other_logits(packed_NV, padded_NV)
    return reason and f"logits of packed rows are {reason}"


@torch.no_grad()
def _logits(model: PreTrainedModel, layout: Layout, samples: list[Sample]) -> Tensor:
    inputs = layout.lay_out(samples, model.device)
    logits = model(**inputs.arguments, use_cache=False, logits_to_keep=inputs.columns_K).logits
    return logits.flatten(0, 1)[inputs.places_N]
