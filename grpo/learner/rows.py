"""How tensors are cut between ranks: along their first dimension, as `torch.chunk` cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo.learner.ranks import Ranks


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the `total` that a tensor has along its first dimension. A scalar has one."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, shape: Sequence[int], ranks: Ranks) -> Rows:
        """Those of a rank. The last ranks may have fewer than the others, or none."""
        total = shape[0] if shape else 1
        each = -(-total // ranks.size)
        start = min(ranks.rank * each, total)
        return cls(start, min(start + each, total), total)

    @property
    def count(self) -> int:
        return self.stop - self.start

    def shared_with(self, other: Rows) -> tuple[slice, slice]:
        """Where the rows that both have lie in this part, and where in the other. The slices may be empty."""
        start = max(self.start, other.start)
        stop = max(start, min(self.stop, other.stop))
        return slice(start - self.start, stop - self.start), slice(start - other.start, stop - other.start)
