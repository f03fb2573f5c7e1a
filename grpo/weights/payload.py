"""A model's weights as one flat host buffer.

Pickled torch tensors cross the object store at 1/30 of the speed of a numpy array, which travels out of band and is
mapped read-only by every process of a node. So weights travel as bytes, whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from grpo.errors import WeightsError
from grpo.weights.flat_buffer import (
    PIECE,
    TensorSpec,
    all_finite,
    buffer_checksum,
    buffer_for,
    combined_checksum,
    lay_out,
    piece_checksum,
    pieces,
    views,
)

R = TypeVar("R")


@dataclass(frozen=True)
class WeightsHeader:
    """What is to be known of weights before their bytes arrive."""

    version: int
    specs: tuple[TensorSpec, ...]
    checksum: int

    def weights(self, buffer: NDArray[np.uint8]) -> Weights:
        """With the bytes, uint8 [total bytes]."""
        return Weights(self.version, self.specs, buffer, self.checksum)


@dataclass(frozen=True)
class Weights:
    """The parameters behind one policy version. `buffer` is uint8 [total bytes]; tied parameters appear once.

    `checksum` is the buffer's; no engine that has a model loads weights whose checksum is another.
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]
    checksum: int = 0

    @property
    def header(self) -> WeightsHeader:
        return WeightsHeader(self.version, self.specs, self.checksum)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into the buffer by name. Read-only: the buffer may be shared by every process of the node."""
        return views(self.specs, self.buffer)


@dataclass(frozen=True)
class _Part:
    """What a piece of the buffer holds of one parameter: these of its elements, in `target`, a view of the buffer."""

    parameter: int
    elements: slice
    target: torch.Tensor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that have gradients, by name, tied ones once: what is trained, kept and published."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class WeightsWriter:
    """Copies the trained parameters of a model into a host buffer that is allocated once and reused.

    Memory is what this waits for. So every piece of the buffer is filled and checked while it is in the cache, and as
    many threads as torch may use share the pieces.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._parameters, self._dtype = trained_parameters(model), dtype
        self._specs = lay_out((name, parameter.shape, dtype) for name, parameter in self._parameters.items())
        self._on_gpu = any(parameter.is_cuda for parameter in self._parameters.values())
        self._buffer = buffer_for(self._specs, pinned=self._on_gpu)
        self._pieces = pieces(self._buffer.nbytes)
        self._parts: list[list[_Part]] = [[] for _ in self._pieces]
        for i, (spec, (_, tensor)) in enumerate(zip(self._specs, views(self._specs, self._buffer), strict=True)):
            for j in range(spec.offset // PIECE, -(-(spec.offset + spec.nbytes) // PIECE)):
                start, stop = (max(0, end - spec.offset) // dtype.itemsize for end in (j * PIECE, (j + 1) * PIECE))
                elements = slice(start, min(stop, tensor.numel()))
                self._parts[j].append(_Part(i, elements, tensor.view(-1)[elements]))

    def write(self, version: int) -> Weights:
        """Snapshot the parameters. The next call overwrites the buffer, so its receivers must have loaded by then.

        Raises WeightsError when a parameter is not finite, or not in the published dtype: such weights are never
        published.
        """
        if self._on_gpu:
            return self._write_from_gpu(version)
        sources = [parameter.detach().reshape(-1) for parameter in self._parameters.values()]
        return self._finish(version, partial(self._fill, version, sources))

    def _write_from_gpu(self, version: int) -> Weights:
        """A GPU converts and copies all of it faster than threads do piece by piece."""
        for (_, target), parameter in zip(self.tensors(), self._parameters.values(), strict=True):
            target.copy_(parameter.detach(), non_blocking=True)
        torch.cuda.synchronize()
        return self.seal(version)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into the buffer by name, for one who writes there without this class; then comes `seal`."""
        return views(self._specs, self._buffer)

    def seal(self, version: int) -> Weights:
        """As `write`, of what is in the buffer."""
        return self._finish(version, partial(self._check, version))

    def _finish(self, version: int, work: Callable[[int], bytes]) -> Weights:
        checksums = _shared_out(work, len(self._pieces), torch.get_num_threads())
        return Weights(version, self._specs, self._buffer, combined_checksum(checksums))

    def _fill(self, version: int, sources: Sequence[torch.Tensor], number: int) -> bytes:
        """Copy what belongs into one piece; returns its checksum."""
        for part in self._parts[number]:
            part.target.copy_(sources[part.parameter][part.elements])
        return self._check(version, number)

    def _check(self, version: int, number: int) -> bytes:
        """The checksum of a piece, if it is finite."""
        piece = self._buffer[self._pieces[number]]
        if not all_finite(piece, self._dtype):
            part = next(part for part in self._parts[number] if not torch.isfinite(part.target).all())
            name = self._specs[part.parameter].name
            raise WeightsError(f"{name} holds NaN or infinity at version {version}: not published")
        return piece_checksum(piece)


def _shared_out(work: Callable[[int], R], count: int, threads: int) -> list[R]:
    """What `work` makes of 0, 1, ..., count - 1, of which every thread takes an equal share.

    Torch starts no threads of its own inside.
    """
    shares = [range(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads, "weights", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = [result for share in pool.map(lambda share: [work(i) for i in share], shares) for result in share]
    torch.set_num_threads(threads)  # what later threads begin with, and the pool's have changed
    return results


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a trainer of the whole model publishes, by name."""
    return {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}


def check_fit(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    """Raise WeightsError when the names or shapes of published weights are not exactly the expected ones."""
    published = {spec.name: spec.shape for spec in weights.specs}
    if expected != published:
        differing = sorted({name for name, _ in expected.items() ^ published.items()})
        raise WeightsError(f"version {weights.version} does not fit the model; it differs in {differing[:4]}")


def check_intact(weights: Weights) -> None:
    """Raise WeightsError when the buffer is not, byte for byte, the one that was published."""
    if buffer_checksum(weights.buffer) != weights.checksum:
        raise WeightsError(f"version {weights.version} was damaged on its way: its checksum is another; not loaded")


class StagedWeights:
    """Published weights, which `check_intact` has let pass, where a model needs them; `swap` brings them into use.

    Getting them there is the slow part, and a model can compute meanwhile. A buffer that nobody can write to any more,
    as the object store hands it out, becomes the memory of the parameters: nothing is copied, all models of a node
    share it, and it is freed when they have the next. Such parameters must not be written to. Everything else is
    copied: a buffer that may be used again, and what goes to a GPU, which holds the model twice for a moment, or to
    another dtype.

    Raises WeightsError when names or shapes are not exactly the model's, or, for a `part`, not its.
    """

    def __init__(self, model: nn.Module, weights: Weights, *, part: bool = False) -> None:
        if not part:
            check_fit(parameter_shapes(model), weights)
        self._owned = weights.buffer.flags.writeable
        parameters = dict(model.named_parameters())
        with copying_beside(next(iter(parameters.values())).device):
            self._pairs = [
                (parameters[name], self._put(tensor, parameters[name])) for name, tensor in weights.tensors()
            ]

    def _put(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if (parameter.device, parameter.dtype) != (tensor.device, tensor.dtype):
            return tensor.to(parameter.device, parameter.dtype)
        return tensor.clone() if self._owned else tensor

    @torch.no_grad()
    def swap(self) -> None:
        """From now on the model computes with them."""
        for parameter, tensor in self._pairs:
            if parameter.is_cuda:
                parameter.copy_(tensor)  # recorded graphs read this very memory
            else:  # never into the old memory, which may be the store's
                parameter.data = tensor
        if any(parameter.is_cuda for parameter, _ in self._pairs):
            torch.cuda.current_stream().synchronize()  # before the memory of what was copied is used again
        self._pairs.clear()


def load_weights(model: nn.Module, weights: Weights, *, part: bool = False) -> None:
    """Stage and swap in one go."""
    StagedWeights(model, weights, part=part).swap()


@contextmanager
def copying_beside(device: torch.device) -> Iterator[None]:
    """On a GPU, copies that do not wait for what computes there, nor keep it waiting; done at the end."""
    if device.type != "cuda":
        yield
        return
    stream = _copy_stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also after an error: what is copied from and to must not be used for something else before
        stream.synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same: torch keeps the memory that was allocated on a stream for that stream."""
    return torch.cuda.Stream(device)
