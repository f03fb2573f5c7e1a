"""LoRA adapters as they are published, and the merge into the base model's weights.

A base matrix W [O, I] has the adapters A [R, I] and B [O, R]; merged it is W + scale * B A (Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", 2021). Only A and B are published, under peft's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from grpo.errors import WeightsError
from grpo.weights.flat_buffer import buffer_for, lay_out, views
from grpo.weights.payload import Weights

ADAPTER = "default"  # peft names adapters, since a model may hold several
A, B = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"


class Merge:
    """Turn published adapters into weights, always from the untouched base: rounding never accumulates over versions.

    `base` has the parameters of the base model on the CPU by name; memory-mapped ones are read when needed. Products
    are computed in float32 and rounded once.

    Example:
        merge = Merge(base_of(model), lora.scale)
        load_weights(model, merge(published), part=True)
    """

    def __init__(self, base: Mapping[str, Tensor], scale: float) -> None:
        self._base, self._scale = base, scale

    def check_fit(self, weights: Weights) -> None:
        """Raise WeightsError if the weights are not adapters of the base's matrices, each A with its B."""
        published = {spec.name: spec.shape for spec in weights.specs}
        unfit = [name for name in published if not self._fits(published, module_of(name))]
        if unfit or not published:
            raise WeightsError(f"version {weights.version} are no adapters of the model; it differs in {unfit[:4]}")

    @torch.no_grad()
    def __call__(self, weights: Weights) -> Weights:
        """Return the merged matrices under their names and dtypes in the base, in a new read-only buffer.

        The buffer also holds the other parameters of the same blocks, unchanged: vLLM fuses some neighbors into one
        matrix, which it loads as a whole or not at all. Raises WeightsError if `check_fit` does.
        """
        self.check_fit(weights)
        adapters = dict(weights.tensors())
        modules = {module_of(name) for name in adapters}
        blocks = tuple({module[: module.rfind(".") + 1] for module in modules})
        sources = {name: tensor for name, tensor in self._base.items() if name.startswith(blocks)}

        # One allocation per version: the generator's parameters become views of it.
        specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in sources.items())
        buffer = buffer_for(specs)
        for name, target in views(specs, buffer):
            module = name.removesuffix(".weight")
            if module in modules:
                a_RI, b_OR = adapters[f"{module}.{A}"], adapters[f"{module}.{B}"]
                target.copy_(merged(sources[name], a_RI, b_OR, self._scale))
            else:
                target.copy_(sources[name])
        buffer.flags.writeable = False
        return replace(weights, specs=specs, buffer=buffer, checksum=0)

    def _fits(self, published: Mapping[str, tuple[int, ...]], module: str) -> bool:
        base = self._base.get(f"{module}.weight")
        a_RI, b_OR = published.get(f"{module}.{A}"), published.get(f"{module}.{B}")
        if base is None or a_RI is None or b_OR is None:
            return False
        return tuple(base.shape) == (b_OR[0], a_RI[1]) and a_RI[0] == b_OR[1]


def merged(base_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return base + scale * B A as float32 [O, I]."""
    return torch.addmm(base_OI.float(), b_OR.float(), a_RI.float(), alpha=scale)


def module_of(name: str) -> str:
    """Return the module that an adapter's parameter belongs to."""
    ending = next((ending for ending in (A, B) if name.endswith(f".{ending}")), name)
    return name.removesuffix(ending).removesuffix(".")


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's present parameters by name, uncopied. They stay valid when the model is given new ones."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
