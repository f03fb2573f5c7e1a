"""LoRA: low-rank adapters on a model, by peft, which is imported only if adapters are used."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from grpo.config.actors import LoraConfig, ModelConfig
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.weights.adapters import ADAPTER, module_of
from grpo.weights.payload import trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # peft's names for its files


def check_peft(config: LoraConfig) -> None:
    """Raise ConfigError if adapters are configured but peft is missing."""
    if config.rank > 0 and importlib.util.find_spec("peft") is None:
        raise ConfigError("needs peft: pip install -e '.[lora]'", key="lora.rank")


def check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ConfigError for target modules that don't exist, are not nn.Linear, or share their weights."""
    targets, modules = config.target_modules, dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    named = [] if targets == "all-linear" else targets
    adapted = [name for name in modules if _matches(name, named)]
    unknown = [target for target in named if not any(_matches(name, [target]) for name in modules)]
    wrong = unknown or [name for name in adapted if name not in linear]

    # The fix is a list of what could be adapted; peft never adapts the head with "all-linear".
    head = model.get_output_embeddings()
    endings = sorted({name.rpartition(".")[2] for name in linear if modules[name] is not head})
    if wrong or not endings:
        raise ConfigError(
            f"{wrong[0] if wrong else targets!r} is not an nn.Linear of {type(model).__name__}. It has "
            f"{', '.join(endings) or 'none'}.",
            key="lora.target_modules",
        )

    # An adapter on a tied weight would change the other layer too.
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if tied := [name for name in adapted if uses[id(modules[name].weight)] > 1]:
        raise ConfigError(
            f"{tied[0]} shares its weights with another layer, which an adapter would change too; leave it out",
            key="lora.target_modules",
        )


def load_policy(config: RunConfig, device: str) -> PreTrainedModel:
    """Load the model that a trainer starts from, on `device` (cpu or cuda).

    Without adapters all of it is float32. With adapters the base is frozen in `model.dtype`, the generators' dtype,
    and the adapters are float32.
    """
    if not config.uses_adapters:
        return load_model(config.model, torch.float32, device)
    model = load_model(config.model, getattr(torch, config.model.dtype), "cpu")
    add_adapters(model, config.lora, config.seed)
    return model.to(device)


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
    """Add float32 adapters to a model on the CPU and freeze everything else.

    Only linear layers are replaced; the model keeps its class. A is random, determined by `seed`; B is zero, so the
    outputs don't change at first. Raises ConfigError as `check_targets` does.
    """
    from peft import inject_adapter_in_model

    check_targets(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(config), model, ADAPTER)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()  # peft uses the base's dtype


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Make the model compute as its base inside the block; adapters get no gradient from it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapters(base: ModelConfig, config: LoraConfig, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapters, given by the names under which they are trained, for `PeftModel.from_pretrained`."""
    settings = _peft_config(config)
    settings.base_model_name_or_path, settings.inference_mode = str(base.path), True
    if config.target_modules == "all-linear":  # some readers don't know this value
        settings.target_modules = sorted({module_of(name).rpartition(".")[2] for name in adapters})
    settings.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": each for name, each in adapters.items()}
    save_file(tensors, folder / TENSORS)


def adapted_base(config: ModelConfig) -> ModelConfig | None:
    """Return the base model of the adapters at `config.path`; None if that is not a folder of adapters."""
    file = Path(str(config.path), ADAPTER_CONFIG)
    if not file.is_file():
        return None
    return replace(config, path=str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")))


def merge_folder(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the base `model` with the adapters of `folder` merged into its weights."""
    from peft import PeftModel

    with warnings.catch_warnings():  # peft uses a name that transformers has deprecated
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _matches(name: str, targets: list[str]) -> bool:
    """Match a module name as peft does."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _peft_config(config: LoraConfig) -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        bias="none",
    )
