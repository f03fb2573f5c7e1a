"""Layout and checksums of many tensors in one flat host buffer, which crosses the object store at memcpy speed.

Checksums are xxh3, about twice as fast as a copy of the same memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

PIECE = 1 << 20  # bytes: a piece fits into the cache, and xxhash before 4.0 holds the GIL while it digests one
_READ = 16 << 20
_ALIGNMENT = 64  # bytes; every tensor can be viewed in place
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a buffer: `offset` is in bytes from the start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def lay_out(entries: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> tuple[TensorSpec, ...]:
    """Assign offsets to tensors of the given (name, shape, dtype), in this order.

    Example:
        specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in model.named_parameters())
        buffer = buffer_for(specs)
        for name, target in views(specs, buffer):
            target.copy_(parameters[name])
    """
    specs, offset = [], 0
    for name, shape, dtype in entries:
        specs.append(TensorSpec(name, tuple(shape), dtype, offset))
        offset += -(-specs[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(specs)


def buffer_for(specs: Sequence[TensorSpec], *, pinned: bool = False) -> NDArray[np.uint8]:
    """Allocate a zeroed uint8 [bytes] buffer for `specs`; `pinned` makes copies from a GPU fast."""
    size = max((spec.offset + spec.nbytes for spec in specs), default=0)
    return torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy() if pinned else np.zeros(size, dtype=np.uint8)


def views(specs: Iterable[TensorSpec], buffer: NDArray[np.uint8]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor), the tensors being views into the buffer."""
    with warnings.catch_warnings():  # torch warns that it can't enforce read-only memory, which is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        flat = torch.from_numpy(buffer)
    for spec in specs:
        part = flat[spec.offset : spec.offset + spec.nbytes]
        yield spec.name, part.view(spec.dtype).view(spec.shape)


def all_finite(content: NDArray[np.uint8], dtype: torch.dtype) -> bool:
    """Return whether bytes that hold numbers of `dtype` contain neither NaN nor infinity.

    IEEE 754 orders floats like integers, with infinity and NaN last: the maximum as signed integers is the largest
    positive number, the maximum as unsigned integers the most negative one. This reads the bytes twice, and unlike a
    sum it can't overflow.
    """
    infinity, sign = _infinity_bits(dtype), 1 << (8 * dtype.itemsize - 1)
    positive = content.view(f"i{dtype.itemsize}").max(initial=0)
    negative = content.view(f"u{dtype.itemsize}").max(initial=0)
    return bool(positive < infinity and negative < sign + infinity)


@cache
def _infinity_bits(dtype: torch.dtype) -> int:
    return int(torch.tensor(torch.inf, dtype=dtype).view(_INTEGERS[dtype.itemsize]).item())


def pieces(nbytes: int) -> list[slice]:
    """Cut a buffer into pieces of PIECE bytes; the last one may be shorter."""
    return [slice(start, min(start + PIECE, nbytes)) for start in range(0, nbytes, PIECE)]


def piece_checksum(piece: NDArray[np.uint8]) -> bytes:
    """Return the 64-bit checksum of a uint8 [bytes] piece."""
    return xxhash.xxh3_64_digest(piece.data)


def combined_checksum(piece_checksums: Iterable[bytes]) -> int:
    """Return the 64-bit checksum of a buffer from its pieces' checksums in order.

    A writer can so compute each piece's checksum while the piece is in the cache.
    """
    return xxhash.xxh3_64_intdigest(b"".join(piece_checksums))


def buffer_checksum(buffer: NDArray[np.uint8]) -> int:
    """Return the 64-bit checksum of a uint8 [bytes] buffer."""
    return combined_checksum(piece_checksum(buffer[piece]) for piece in pieces(buffer.nbytes))


def file_checksum(path: Path) -> str:
    """Return the 64-bit checksum of a file as 16 hexadecimal digits. Raises OSError."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(_READ):
            digest.update(piece)
    return digest.hexdigest()
