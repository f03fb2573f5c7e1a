"""A model's weights as one flat host buffer.

Pickled torch tensors cross the object store at 1/30 of the speed of a numpy array, which travels out of band and is
mapped read-only by every process of a node. So weights travel as bytes, whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """Everything about weights except their bytes."""

    version: int
    specs: tuple[TensorSpec, ...]
    checksum: int

    def weights(self, buffer: NDArray[np.uint8]) -> Weights:
        """Add the bytes, uint8 [total bytes]."""
        return Weights(self.version, self.specs, buffer, self.checksum)


@dataclass(frozen=True)
class Weights:
    """The parameters of one policy version. `buffer` is uint8 [total bytes]; tied parameters appear once.

    `checksum` is the buffer's. Engines with a model refuse weights whose buffer has a different checksum.

    Example:
        weights = WeightsWriter(trainer_model, torch.bfloat16).write(version=3)
        check_intact(weights)                       # in the generator
        load_weights(generator_model, weights)
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]
    checksum: int = 0

    @property
    def header(self) -> WeightsHeader:
        return WeightsHeader(self.version, self.specs, self.checksum)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield views into the buffer by name. Read-only: every process of the node may share the buffer."""
        return views(self.specs, self.buffer)


@dataclass(frozen=True)
class _Part:
    """The elements of one parameter that lie in one piece; `target` is a view of the buffer."""

    parameter: int
    elements: slice
    target: torch.Tensor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with gradients by name, tied ones once: they are trained, checkpointed and published."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class WeightsWriter:
    """Copy the trained parameters of a model into a host buffer that is allocated once and reused.

    The copy is bound by memory bandwidth. So each piece of the buffer is filled, checked and digested while it is in
    the cache, and the pieces are divided among as many threads as torch may use.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._parameters, self._dtype = trained_parameters(model), dtype
        self._specs = lay_out((name, parameter.shape, dtype) for name, parameter in self._parameters.items())
        self._on_gpu = any(parameter.is_cuda for parameter in self._parameters.values())
        self._buffer = buffer_for(self._specs, pinned=self._on_gpu)
        self._pieces = pieces(self._buffer.nbytes)

        # Cut every parameter at the borders of the pieces that it lies in.
        self._parts: list[list[_Part]] = [[] for _ in self._pieces]
        for i, (spec, (_, tensor)) in enumerate(zip(self._specs, views(self._specs, self._buffer), strict=True)):
            for j in range(spec.offset // PIECE, -(-(spec.offset + spec.nbytes) // PIECE)):
                start, stop = (max(0, end - spec.offset) // dtype.itemsize for end in (j * PIECE, (j + 1) * PIECE))
                elements = slice(start, min(stop, tensor.numel()))
                self._parts[j].append(_Part(i, elements, tensor.view(-1)[elements]))

    def write(self, version: int) -> Weights:
        """Snapshot the parameters. The next call overwrites the buffer, so receivers must have loaded it by then.

        Raises WeightsError if a parameter is not finite, or overflows the published dtype: such weights are never
        published.
        """
        if self._on_gpu:  # a GPU converts and copies everything at once faster than threads do piece by piece
            for (_, target), parameter in zip(self.tensors(), self._parameters.values(), strict=True):
                target.copy_(parameter.detach(), non_blocking=True)
            torch.cuda.synchronize()
            return self.seal(version)
        sources = [parameter.detach().reshape(-1) for parameter in self._parameters.values()]

        def copy_piece(number: int) -> bytes:
            for part in self._parts[number]:
                part.target.copy_(sources[part.parameter][part.elements])
            return self._digest(version, number)

        return self._weights(version, copy_piece)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield views into the buffer by name, for a caller that fills them without `write` and then calls `seal`."""
        return views(self._specs, self._buffer)

    def seal(self, version: int) -> Weights:
        """Check the present content of the buffer and return it, as `write` does."""
        return self._weights(version, partial(self._digest, version))

    def _weights(self, version: int, digest: Callable[[int], bytes]) -> Weights:
        checksums = _parallel_map(digest, len(self._pieces), torch.get_num_threads())
        return Weights(version, self._specs, self._buffer, combined_checksum(checksums))

    def _digest(self, version: int, number: int) -> bytes:
        """Return the checksum of a piece. Raises WeightsError if it is not finite."""
        piece = self._buffer[self._pieces[number]]
        if not all_finite(piece, self._dtype):
            part = next(part for part in self._parts[number] if not torch.isfinite(part.target).all())
            name = self._specs[part.parameter].name
            raise WeightsError(f"{name} holds NaN or infinity at version {version}: not published")
        return piece_checksum(piece)


def _parallel_map(work: Callable[[int], R], count: int, threads: int) -> list[R]:
    """Return [work(0), ..., work(count - 1)], in equal contiguous shares per thread. Torch adds no threads inside."""
    shares = [range(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads, "weights", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = [result for share in pool.map(lambda share: [work(i) for i in share], shares) for result in share]
    torch.set_num_threads(threads)  # the pool's setting would otherwise become the default of later threads
    return results


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes, by name, of the parameters that a trainer of the whole model publishes."""
    return {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}


def check_fit(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    """Raise WeightsError if the names or shapes of published weights are not exactly the expected ones."""
    published = {spec.name: spec.shape for spec in weights.specs}
    if expected != published:
        differing = sorted({name for name, _ in expected.items() ^ published.items()})
        raise WeightsError(f"version {weights.version} does not fit the model; it differs in {differing[:4]}")


def check_intact(weights: Weights) -> None:
    """Raise WeightsError if the buffer is not byte for byte the one that was published."""
    if buffer_checksum(weights.buffer) != weights.checksum:
        raise WeightsError(f"version {weights.version} was damaged on its way (wrong checksum); not loaded")


class StagedWeights:
    """Published weights, already checked with `check_intact`, on the model's device; `swap` puts them into use.

    Staging is the slow part, and the model can compute meanwhile. A read-only buffer, as the object store returns it,
    becomes the memory of the parameters: nothing is copied, all models of a node share it, and it is freed when they
    load the next version. Such parameters must not be written to. A writable buffer is copied, since it may be reused;
    so are weights for another dtype, or for a GPU, which for a moment holds the model twice.

    With `part`, the weights are a subset of the model's parameters. Raises WeightsError if, without `part`, names or
    shapes are not exactly the model's.
    """

    def __init__(self, model: nn.Module, weights: Weights, *, part: bool = False) -> None:
        if not part:
            check_fit(parameter_shapes(model), weights)
        self._must_copy = weights.buffer.flags.writeable
        parameters = dict(model.named_parameters())
        with on_copy_stream(next(iter(parameters.values())).device):
            self._pairs = [
                (parameters[name], self._stage(tensor, parameters[name])) for name, tensor in weights.tensors()
            ]

    def _stage(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if (parameter.device, parameter.dtype) != (tensor.device, tensor.dtype):
            return tensor.to(parameter.device, parameter.dtype)
        return tensor.clone() if self._must_copy else tensor

    @torch.no_grad()
    def swap(self) -> None:
        """Make the model compute with the staged weights."""
        for parameter, tensor in self._pairs:
            if parameter.is_cuda:
                parameter.copy_(tensor)  # CUDA graphs read this very memory
            else:  # the old memory may be the object store's: never write to it
                parameter.data = tensor
        if any(parameter.is_cuda for parameter, _ in self._pairs):
            torch.cuda.current_stream().synchronize()  # before the memory of the staged tensors is reused
        self._pairs.clear()


def load_weights(model: nn.Module, weights: Weights, *, part: bool = False) -> None:
    """Stage and swap at once. Raises WeightsError as StagedWeights."""
    StagedWeights(model, weights, part=part).swap()


@contextmanager
def on_copy_stream(device: torch.device) -> Iterator[None]:
    """Run the block's copies on a CUDA stream of their own, beside computation; they are complete at the end."""
    if device.type != "cuda":
        yield
        return
    stream = _copy_stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also after an error: the memory of unfinished copies must not be reused
        stream.synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream per device: torch keeps memory that was allocated on a stream for that stream."""
    return torch.cuda.Stream(device)
