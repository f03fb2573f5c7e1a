"""A model's weights as one flat host buffer.

Pickled torch tensors cross the object store at 1/30 of the speed of a numpy array, which travels out of band and is
mapped read-only by every process of a node. So weights travel as bytes, whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from grpo.checksum import buffer_checksum
from grpo.flat_buffer import TensorSpec, buffer_for, lay_out, views
from grpo.types import WeightsError


@dataclass(frozen=True)
class Weights:
    """The parameters behind one policy version. `buffer` is uint8 [total bytes]; tied parameters appear once.

    `checksum` is the buffer's; no engine that has a model loads weights whose checksum is another.
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]
    checksum: int = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into the buffer by name. Read-only: the buffer may be shared by every process of the node."""
        return views(self.specs, self.buffer)


class WeightsWriter:
    """Copies a model's parameters into a host buffer that is allocated once and reused."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._specs = lay_out((name, parameter.shape, dtype) for name, parameter in model.named_parameters())
        self._buffer = buffer_for(self._specs)

    @torch.no_grad()
    def write(self, version: int) -> Weights:
        """Snapshot the parameters. The next call overwrites the buffer, so its receivers must have loaded by then.

        Raises WeightsError when a parameter is not finite, or not in the published dtype: such weights are never
        published.
        """
        weights = Weights(version, self._specs, self._buffer)
        for (name, target), parameter in zip(weights.tensors(), self._model.parameters(), strict=True):
            converted = parameter.to(target.dtype)
            if not torch.isfinite(converted).all():
                raise WeightsError(f"{name} holds NaN or infinity at version {version}: not published")
            target.copy_(converted)
        return replace(weights, checksum=buffer_checksum(self._buffer))


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name; tied ones appear once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_fit(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    """Raise WeightsError when the names or shapes of published weights are not exactly the expected ones."""
    published = {spec.name: spec.shape for spec in weights.specs}
    if expected != published:
        differing = sorted(name for name, _ in set(expected.items()) ^ set(published.items()))
        raise WeightsError(f"version {weights.version} does not fit the model; it differs in {differing[:4]}")


def check_intact(weights: Weights) -> None:
    """Raise WeightsError when the buffer is not, byte for byte, the one that was published."""
    if buffer_checksum(weights.buffer) != weights.checksum:
        raise WeightsError(f"version {weights.version} was damaged on its way: its checksum is another; not loaded")


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy published weights into a model in place.

    Raises WeightsError, before anything is changed, when names or shapes are not exactly the model's, or when the
    weights were damaged on their way.
    """
    check_fit(parameter_shapes(model), weights)
    check_intact(weights)
    parameters = dict(model.named_parameters())
    for name, tensor in weights.tensors():
        parameters[name].copy_(tensor)
