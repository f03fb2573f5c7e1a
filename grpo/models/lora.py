"""Low-rank adapters on a model, by peft, which is imported only where there are some."""

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

ADAPTER_CONFIG = "adapter_config.json"  # peft's name for it
TENSORS = "adapter_model.safetensors"


def check_peft(config: LoraConfig) -> None:
    """Raise ConfigError when adapters are asked for and peft is missing."""
    if config.rank > 0 and importlib.util.find_spec("peft") is None:
        raise ConfigError("needs peft: pip install -e '.[lora]'", key="lora.rank")


def check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ConfigError for target modules that are not there, are no nn.Linear, or share their weights."""
    targets, modules = config.target_modules, dict(model.named_modules())
    head, linear = model.get_output_embeddings(), {n for n, m in modules.items() if isinstance(m, nn.Linear)}
    endings = sorted({name.rpartition(".")[2] for name in linear if modules[name] is not head})
    adapted = [name for name in modules if targets != "all-linear" and _matches(name, targets)]
    unknown = [] if targets == "all-linear" else [t for t in targets if not any(_matches(n, [t]) for n in modules)]
    wrong = unknown or [name for name in adapted if name not in linear]
    if wrong or not endings:
        raise ConfigError(
            f"{wrong[0] if wrong else targets!r} is no nn.Linear of {type(model).__name__}, which has "
            f"{', '.join(endings) or 'none'}",
            key="lora.target_modules",
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if tied := [name for name in adapted if uses[id(modules[name].weight)] > 1]:
        raise ConfigError(
            f"{tied[0]} shares its weights with another layer, which an adapter would change too: leave it out",
            key="lora.target_modules",
        )


def load_policy(config: RunConfig, device: str) -> PreTrainedModel:
    """The model as a trainer begins with it, on `device` (cpu or cuda).

    All of it in float32; or, with adapters, its base in `model.dtype`, as generators have it, and frozen, and the
    adapters in float32.
    """
    if not config.uses_adapters:
        return load_model(config.model, torch.float32, device)
    model = load_model(config.model, getattr(torch, config.model.dtype), "cpu")
    add_adapters(model, config.lora, config.seed)
    return model.to(device)


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
    """Put adapters, in float32, into a model on the CPU, and freeze all else. B is zero: it computes what it did.

    The class of the model stays, only its linear layers are others. A is random, the same for the same seed.
    Raises ConfigError as `check_targets`.
    """
    from peft import inject_adapter_in_model

    check_targets(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(config), model, ADAPTER)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()  # peft takes the base's dtype


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base does; adapters have no gradient there."""
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
    """Write what `PeftModel.from_pretrained` reads, of adapters under the names that they are trained by."""
    settings = _peft_config(config)
    settings.base_model_name_or_path, settings.inference_mode = str(base.path), True
    if config.target_modules == "all-linear":  # not every reader knows the word
        settings.target_modules = sorted({module_of(name).rpartition(".")[2] for name in adapters})
    settings.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": each for name, each in adapters.items()}
    save_file(tensors, folder / TENSORS)


def adapted_base(config: ModelConfig) -> ModelConfig | None:
    """The model that the adapters at `config.path` are for; None where that is no folder of adapters."""
    file = Path(str(config.path), ADAPTER_CONFIG)
    if not file.is_file():
        return None
    return replace(config, path=str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")))


def merge_folder(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base `model` with the adapters of `folder` merged into its weights."""
    from peft import PeftModel

    with warnings.catch_warnings():  # that peft asks transformers for what has another name now
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _matches(name: str, targets: list[str]) -> bool:
    """As peft does."""
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
