"""Many tensors in one flat host buffer, so that they cross the object store at the speed of a copy of memory."""

# MERGED: Checksums that tell damage from what was written: xxh3, about twice as fast as a copy of the same memory.

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

_ALIGNMENT = 64  # bytes; lets every tensor be viewed in place
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in the buffer: `offset` in bytes from its start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def lay_out(entries: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> tuple[TensorSpec, ...]:
    """Places for tensors of the given (name, shape, dtype), one behind the other in this order."""
    specs, offset = [], 0
    for name, shape, dtype in entries:
        specs.append(TensorSpec(name, tuple(shape), dtype, offset))
        offset += -(-specs[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(specs)


def buffer_for(specs: Sequence[TensorSpec], *, pinned: bool = False) -> NDArray[np.uint8]:
    """uint8 [bytes] of zeros, with room for all of them; `pinned` for fast copies from a GPU."""
    size = max((spec.offset + spec.nbytes for spec in specs), default=0)
    return torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy() if pinned else np.zeros(size, dtype=np.uint8)


def views(specs: Iterable[TensorSpec], buffer: NDArray[np.uint8]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by name, as views into the buffer."""
    with warnings.catch_warnings():  # torch warns that it can't enforce what we only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        flat = torch.from_numpy(buffer)
    for spec in specs:
        part = flat[spec.offset : spec.offset + spec.nbytes]
        yield spec.name, part.view(spec.dtype).view(spec.shape)


def all_finite(content: NDArray[np.uint8], dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype with infinities, as bytes, hold neither NaN nor infinity.

    IEEE 754 orders them like integers, infinity and NaN last: the greatest as signed integers is the greatest positive
    one, as unsigned integers the most negative one. That reads the bytes twice, and no sum of finite numbers overflows.
    """
    infinity, sign = _infinity(dtype), 1 << (8 * dtype.itemsize - 1)
    positive = content.view(f"i{dtype.itemsize}").max(initial=0)
    negative = content.view(f"u{dtype.itemsize}").max(initial=0)
    return bool(positive < infinity and negative < sign + infinity)


@cache
def _infinity(dtype: torch.dtype) -> int:
    """Its bits."""
    return int(torch.tensor(torch.inf, dtype=dtype).view(_INTEGERS[dtype.itemsize]).item())


PIECE = 1 << 20  # bytes: they stay in the cache, and xxhash before 4.0 lets no other thread run meanwhile
_READ = 16 << 20


def pieces(nbytes: int) -> list[slice]:
    """The pieces of a buffer: PIECE bytes each, the last as many as there are."""
    return [slice(start, min(start + PIECE, nbytes)) for start in range(0, nbytes, PIECE)]


def piece_checksum(piece: NDArray[np.uint8]) -> bytes:
    """64 bits of a uint8 [bytes] piece."""
    return xxhash.xxh3_64_digest(piece.data)


def combined_checksum(piece_checksums: Iterable[bytes]) -> int:
    """64 bits of a buffer, from those of its pieces in order: who writes it can take each while it is in the cache."""
    return xxhash.xxh3_64_intdigest(b"".join(piece_checksums))


def buffer_checksum(buffer: NDArray[np.uint8]) -> int:
    """64 bits of a uint8 [bytes] buffer."""
    return combined_checksum(piece_checksum(buffer[piece]) for piece in pieces(buffer.nbytes))


def file_checksum(path: Path) -> str:
    """64 bits of a file's content, as 16 hexadecimal digits. Raises OSError."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(_READ):
            digest.update(piece)
    return digest.hexdigest()
