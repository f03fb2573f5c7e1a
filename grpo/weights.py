"""A model's weights as one flat host buffer.

Pickled torch tensors cross the object store at 1/30 of the speed of a numpy array, which travels out of band and is
mapped read-only by every process of a node. So weights travel as bytes, whatever their dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from grpo.types import WeightsError

_ALIGNMENT = 64  # bytes; lets every tensor be viewed in place


@dataclass(frozen=True)
class TensorSpec:
    """Where one parameter lies in the buffer: `offset` in bytes from its start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """The parameters behind one policy version. `buffer` is uint8 [total bytes]; tied parameters appear once."""

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into the buffer by name. Read-only: the buffer may be shared by every process of the node."""
        with warnings.catch_warnings():  # torch warns that it can't enforce what we only read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            flat = torch.from_numpy(self.buffer)
        for spec in self.specs:
            part = flat[spec.offset : spec.offset + spec.nbytes]
            yield spec.name, part.view(spec.dtype).view(spec.shape)


class WeightsWriter:
    """Copies a model's parameters into a host buffer that is allocated once and reused."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        specs, offset = [], 0
        for name, parameter in model.named_parameters():
            spec = TensorSpec(name, tuple(parameter.shape), dtype, offset)
            specs.append(spec)
            offset += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._specs = tuple(specs)
        self._buffer = np.zeros(offset, dtype=np.uint8)

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
        return weights


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name; tied ones appear once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_fit(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    """Raise WeightsError when the names or shapes of published weights are not exactly the expected ones."""
    published = {spec.name: spec.shape for spec in weights.specs}
    if expected != published:
        differing = sorted(name for name, _ in set(expected.items()) ^ set(published.items()))
        raise WeightsError(f"version {weights.version} does not fit the model; it differs in {differing[:4]}")


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy published weights into a model in place.

    Raises WeightsError, before anything is changed, when names or shapes are not exactly the model's.
    """
    check_fit(parameter_shapes(model), weights)
    parameters = dict(model.named_parameters())
    for name, tensor in weights.tensors():
        parameters[name].copy_(tensor)
