"""Loading ordinary Hugging Face models, the one way for every actor."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from grpo.config import ModelConfig

transformers_logging.disable_progress_bar()


def load_model(config: ModelConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The causal LM at `config.path`, in evaluation mode, on `device` (cpu or cuda).

    Dropout is switched off: the trainer has to see the very distribution that the generator sampled from.
    """
    settings = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    for name in list(vars(settings)):
        if name.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop")):
            setattr(settings, name, 0.0)
    model = AutoModelForCausalLM.from_pretrained(
        config.path,
        config=settings,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
    )
    return model.to(device).eval()


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence token that the generation config or the tokenizer names (chat models list several)."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None}))
