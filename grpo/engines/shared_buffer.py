"""Bytes that another process of this node can read without a copy."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray


class SharedBuffer:
    """A file that exists only in memory (memfd): nothing to clean up when a process dies, no limit of /dev/shm.

    Another process of the same user maps `path`; the memory is freed when the last mapping is gone. Linux only.
    """

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create("grpo-weights")
        os.ftruncate(self._file, size)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r+", shape=(size,))

    def write(self, buffer: NDArray[np.uint8]) -> None:
        """Replace the contents by `buffer`, uint8 [size]. Readers see it at once."""
        np.copyto(self._bytes, buffer)

    def close(self) -> None:
        os.close(self._file)


def read_shared(path: str, size: int) -> NDArray[np.uint8]:
    """A read-only view, uint8 [size], of a SharedBuffer of another process."""
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(size,))
