"""Writing ordinary Hugging Face folders, the one way for checkpoints and for users."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from grpo.config import ModelConfig
from grpo.models.loading import load_original
from grpo.models.tokenizer import load_tokenizer
from grpo.types import CheckpointError


@torch.no_grad()
def export_model(source: ModelConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Write the model at `source.path` with other parameters, as `dtype`, and its tokenizer.

    `parameters` are named as by `named_parameters`, tied ones once; each is asked for once. Raises CheckpointError for
    those of another model.
    """
    model = load_original(source, dtype)
    targets = dict(model.named_parameters())
    differing = [*(targets.keys() ^ parameters.keys())]
    for name in targets.keys() & parameters.keys():
        parameter = parameters[name]
        if parameter.shape == targets[name].shape:
            targets[name].copy_(parameter)
        else:
            differing.append(name)
    if differing:
        raise CheckpointError(f"the trained parameters don't fit {source.path}; they differ in {sorted(differing)[:4]}")
    _make_storable(model.generation_config)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def _make_storable(generation: GenerationConfig) -> None:
    """Some published models name a temperature and forget to switch sampling on; transformers won't write that."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
