"""Export to Hugging Face folders, for checkpoints and for users."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo.config.actors import LoraConfig, ModelConfig
from grpo.errors import CheckpointError
from grpo.models.loading import cached, load_original
from grpo.models.lora import TENSORS, adapted_base, merge_folder, write_adapters
from grpo.models.tokenizer import load_tokenizer
from grpo.weights.flat_buffer import file_checksum
from grpo.weights.payload import trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def export_model(source: ModelConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Write the model at `source.path` with other parameters, as `dtype`, and its tokenizer.

    `parameters` has the names of `named_parameters`, tied ones once, and each is read once. Raises CheckpointError if
    they don't fit the model.
    """
    model = load_original(source, dtype)
    targets = trained_parameters(model)
    differing = [*(targets.keys() ^ parameters.keys())]
    for name in targets.keys() & parameters.keys():
        parameter = parameters[name]
        if parameter.shape == targets[name].shape:
            targets[name].copy_(parameter)
        else:
            differing.append(name)
    if differing:
        raise CheckpointError(f"the trained parameters don't fit {source.path}; they differ in {sorted(differing)[:4]}")
    _write(model, source, folder)


def export_adapters(source: ModelConfig, config: LoraConfig, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapters of the model at `source.path` in peft's format, and the tokenizer."""
    write_adapters(source, config, adapters, folder)
    load_tokenizer(source).save_pretrained(folder)


def export_merged(adapters: ModelConfig, dtype: torch.dtype, folder: Path) -> None:
    """Merge the adapters at `adapters.path` into their base model, and write the result as `dtype`.

    Merging is done in float32, with one rounding at the end.
    """
    base = adapted_base(adapters)
    assert base is not None
    model = merge_folder(load_original(base, torch.float32), Path(str(adapters.path)))
    _write(model.to(dtype), base, folder)


def merged_model_path(config: ModelConfig) -> str:
    """Return `config.path`, or for a folder of adapters the path of the merged model, which is cached."""
    path = str(config.path)
    if adapted_base(config) is None:
        return path
    name = f"merged-{config.dtype}-{file_checksum(Path(path, TENSORS))}"
    return str(cached(name, lambda folder: export_merged(config, getattr(torch, config.dtype), folder)))


def _write(model: PreTrainedModel, source: ModelConfig, folder: Path) -> None:
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # some published models set a temperature without do_sample, which transformers won't save
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
