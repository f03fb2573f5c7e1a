"""Loading of Hugging Face models for every actor, and the user's cache of models that are prepared once.

Tokenizers are loaded in models/tokenizer.py, since importing models takes a process a second more.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, has_file
from transformers.utils import logging as transformers_logging

from grpo.config.actors import ModelConfig
from grpo.errors import ConfigError
from grpo.utils.torch_utils import check_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

transformers_logging.disable_progress_bar()
_LOADING = Lock()  # from_pretrained changes process-wide state: one thread at a time
_ALIBI_MODELS = ("bloom", "mpt")  # they encode distances, so the column at which a row begins does not matter


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache; if it is missing, `make` fills it first.

    The folder appears complete or not at all. If two processes make it at once, the first one wins.

    Example:
        cached("my-model", lambda folder: model.save_pretrained(folder))
    """
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
            unfinished = Path(temporary, "model")
            unfinished.mkdir()
            make(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:  # another process may have been first
                if not folder.exists():
                    raise
    return folder


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"


def load_model(config: ModelConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load the causal LM at `config.path` in evaluation mode on `device` (cpu or cuda).

    Dropout is switched off: the trainer must see the very distribution that the generator sampled from. Raises
    ConfigError if the device is missing.
    """
    check_device(device, config.dtype)
    settings = load_settings(config)
    for name in list(vars(settings)):
        if name.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop")):
            setattr(settings, name, 0.0)
    return _load(config, settings, dtype).to(device).eval()


def load_original(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal LM at `config.path` with all settings as published, for writing it again."""
    return _load(config, load_settings(config), dtype)


def _load(config: ModelConfig, settings: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with _LOADING:
        return AutoModelForCausalLM.from_pretrained(
            config.path,
            config=settings,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            weights_only=True,  # unpickle tensors only, never code
        )


def load_settings(config: ModelConfig) -> PreTrainedConfig:
    """Load the model's own config, as published."""
    return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """Load the causal LM at `config.path` without its weights: parameter names and shapes, and generation config.

    Raises ConfigError if the model does not support `model.attention`.
    """
    settings = load_settings(config)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                settings, attn_implementation=_attention(config), trust_remote_code=config.trust_remote_code
            )
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            name = settings.model_type
            raise ConfigError(f"{name} models have no {config.attention}; use auto", key="model.attention") from error
    with suppress(OSError):  # without its file, transformers derives the generation config from the model's config
        model.generation_config = GenerationConfig.from_pretrained(config.path)
    return model


def _attention(config: ModelConfig) -> str | None:
    """Return the name that transformers expects; None lets it choose (sdpa if the model has it)."""
    return None if config.attention == "auto" else config.attention


def check_weights(config: ModelConfig) -> None:
    """Raise ConfigError if the model has no safetensors and `model.allow_pickle` is off."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not config.allow_pickle and not any(has_file(config.path, name) for name in names):
        raise ConfigError(
            f"{config.path!r} has no safetensors; set it to true to load pytorch_model.bin", key="model.allow_pickle"
        )


def check_architecture(model: PreTrainedModel, engine: str) -> None:
    """Raise ConfigError for a model that the learner or the engine would get wrong.

    The learner needs the logits of selected columns. The torch engine pads on the left and keeps a KV cache: the model
    must accept the position at which each row begins, and a recurrent state can't be cut into rows and columns.
    """
    name, accepted = type(model).__name__, inspect.signature(model.forward).parameters
    if "logits_to_keep" not in accepted:
        raise ConfigError(f"{name} can't be trained: its forward pass has no logits_to_keep", key="model.path")
    has_positions = "position_ids" in accepted or model.config.model_type in _ALIBI_MODELS
    has_cache = not {"cache", "past_key_values"}.isdisjoint(accepted)  # the newer and the older name
    if engine == "torch" and (model._is_stateful or not has_positions or not has_cache):
        raise ConfigError(
            f"the torch engine can't run {name}, which is recurrent or takes no position_ids; use vllm",
            key="generator.engine",
        )


def context_length(settings: PreTrainedConfig) -> int | None:
    """Return the maximum of prompt plus completion in tokens; None if the architecture sets no limit."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every end-of-sequence token of the generation config and the tokenizer (chat models list several)."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return tuple(sorted({token for token in [*eos, tokenizer.eos_token_id] if token is not None}))
