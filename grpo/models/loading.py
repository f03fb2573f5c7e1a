"""Models that are made once and kept in the user's cache."""

# MERGED: Loading ordinary Hugging Face models, the one way for every actor.

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable
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


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; where it is not there yet, `make` fills it first.

    It appears whole or not at all. Of two processes that make the same folder at once, the first wins.
    """
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
            unfinished = Path(temporary, "model")
            unfinished.mkdir()
            make(unfinished)
            _publish(unfinished, folder)
    return folder


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "grpo"


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise


transformers_logging.disable_progress_bar()
_LOADING = Lock()  # from_pretrained puts the whole process into a state in which no other thread can load
_ALIBI_MODELS = ("bloom", "mpt")  # they look at distances, so it doesn't matter where a row begins


def load_model(config: ModelConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The causal LM at `config.path`, in evaluation mode, on `device` (cpu or cuda).

    Dropout is switched off: the trainer has to see the very distribution that the generator sampled from. Raises
    ConfigError where the device is not there.
    """
    check_device(device, config.dtype)
    settings = load_settings(config)
    for name in list(vars(settings)):
        if name.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop")):
            setattr(settings, name, 0.0)
    return _load(config, settings, dtype).to(device).eval()


def load_original(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM at `config.path` with all settings as its authors published them, to be written again."""
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
            weights_only=True,  # of pickled weights: tensors, and no code
        )


def load_settings(config: ModelConfig) -> PreTrainedConfig:
    """The model's own config, as its authors published it."""
    return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The causal LM at `config.path` without its weights: names and shapes of parameters, generation config."""
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
            raise ConfigError(f"{name} models have no {config.attention}; take auto", key="model.attention") from error
    with contextlib.suppress(OSError):  # not every model has one; the model's config says what it can then
        model.generation_config = GenerationConfig.from_pretrained(config.path)
    return model


def _attention(config: ModelConfig) -> str | None:
    """What transformers calls it; None lets it choose, which is sdpa where the model has that."""
    return None if config.attention == "auto" else config.attention


def check_weights(config: ModelConfig) -> None:
    """Raise ConfigError where there are no safetensors, and others were not asked for."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not config.allow_pickle and not any(has_file(config.path, name) for name in names):
        raise ConfigError(
            f"{config.path!r} has no safetensors; set it to true to load pytorch_model.bin", key="model.allow_pickle"
        )


def check_architecture(model: PreTrainedModel, engine: str) -> None:
    """Raise ConfigError for a model that the learner or the engine would get wrong.

    The learner needs the logits of chosen columns. The torch engine pads on the left and keeps keys and values: it
    has to say where each row begins, and a recurrent state can't be cut into rows and columns.
    """
    name, takes = type(model).__name__, inspect.signature(model.forward).parameters
    if "logits_to_keep" not in takes:
        raise ConfigError(f"{name} can't be trained: its forward pass has no logits_to_keep", key="model.path")
    placed = "position_ids" in takes or model.config.model_type in _ALIBI_MODELS
    keeps = not {"cache", "past_key_values"}.isdisjoint(takes)  # the newer name and the older one
    if engine == "torch" and (model._is_stateful or not placed or not keeps):
        raise ConfigError(
            f"the torch engine can't run {name}, which is recurrent or takes no position_ids; use vllm",
            key="generator.engine",
        )


def context_length(settings: PreTrainedConfig) -> int | None:
    """The most tokens of a prompt and its completion together; None where the architecture sets no limit."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence token that the generation config or the tokenizer names (chat models list several)."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None}))
