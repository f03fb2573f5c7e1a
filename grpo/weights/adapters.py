"""Low-rank adapters as they are published, and the weights that a base model computes with under them.

A matrix W of the base, [O, I], has the adapters A [R, I] and B [O, R]. Merged, it is W + scale * B A (Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", 2021). Published are A and B only, under peft's names for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from grpo.errors import WeightsError
from grpo.weights.flat_buffer import buffer_for, lay_out, views
from grpo.weights.payload import Weights

ADAPTER = "default"  # peft can hold several, by name
A, B = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"


class Merge:
    """Makes weights of adapters: always from the untouched base, so that nothing adds up over versions.

    `base` are the parameters of the base model on the CPU, by name; files that they are mapped from are read when
    they are needed. Products are computed in float32 and rounded once.
    """

    def __init__(self, base: Mapping[str, Tensor], scale: float) -> None:
        self._base, self._scale = base, scale

    def check_fit(self, weights: Weights) -> None:
        """Raise WeightsError when published weights are not adapters of the base's matrices, each A with its B."""
        published = {spec.name: spec.shape for spec in weights.specs}
        modules = [module_of(name) for name in published]
        unfit = [name for name, module in zip(published, modules, strict=True) if not self._fits(published, module)]
        if unfit or not published:
            raise WeightsError(f"version {weights.version} are no adapters of the model; it differs in {unfit[:4]}")

    @torch.no_grad()
    def __call__(self, weights: Weights) -> Weights:
        """The adapted matrices under their names in the base, in its dtypes, in a buffer that nobody writes to again.

        So are the other parameters of their blocks, unchanged: vLLM computes with some neighbours as one matrix, and
        takes all of that or nothing. Raises WeightsError when `check_fit` does.
        """
        self.check_fit(weights)
        adapters = dict(weights.tensors())
        modules = {module_of(name) for name in adapters}
        blocks = tuple({module[: module.rfind(".") + 1] for module in modules})
        chosen = {name: tensor for name, tensor in self._base.items() if name.startswith(blocks)}
        specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in chosen.items())
        buffer = buffer_for(specs)
        for name, target in views(specs, buffer):
            module = name.removesuffix(".weight")
            if module in modules:
                a_RI, b_OR = adapters[f"{module}.{A}"], adapters[f"{module}.{B}"]
                target.copy_(merged(chosen[name], a_RI, b_OR, self._scale))
            else:
                target.copy_(chosen[name])
        buffer.flags.writeable = False
        return replace(weights, specs=specs, buffer=buffer, checksum=0)

    def _fits(self, published: Mapping[str, tuple[int, ...]], module: str) -> bool:
        base = self._base.get(f"{module}.weight")
        a_RI, b_OR = published.get(f"{module}.{A}"), published.get(f"{module}.{B}")
        if base is None or a_RI is None or b_OR is None:
            return False
        return tuple(base.shape) == (b_OR[0], a_RI[1]) and a_RI[0] == b_OR[1]


def merged(base_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """float32 [O, I]: the base with its adapters."""
    return torch.addmm(base_OI.float(), b_OR.float(), a_RI.float(), alpha=scale)


def module_of(name: str) -> str:
    """Whose adapter a parameter is; empty for one that is none."""
    ending = next((ending for ending in (A, B) if name.endswith(f".{ending}")), name)
    return name.removesuffix(ending).removesuffix(".")


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters as they are now, where they are: they stay so when the model gets others."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
