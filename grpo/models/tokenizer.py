"""Loading ordinary Hugging Face tokenizers; apart from models, whose imports take a second more per process."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.config import ModelConfig


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
