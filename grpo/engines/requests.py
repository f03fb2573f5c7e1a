"""What the embedded engine is asked for: groups, and the rows that sample their completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from grpo.engines.prefixes import Prefix
from grpo.engines.sampling import RowSampler
from grpo.types import Completion, Ints, SamplingParams


@dataclass(eq=False)
class Request:
    """One group being generated: rows join as places become free, `completions` fills up as they finish."""

    prompt_ids: Ints
    params: SamplingParams
    arrived_s: float = 0.0  # of time.perf_counter
    joined: int = 0
    prefix: Prefix | None = None  # of the prompt, until the last row has joined
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def to_join(self) -> int:
        return self.params.n - self.joined

    @property
    def done(self) -> bool:
        return len(self.completions) == self.params.n

    def result(self) -> list[Completion]:
        return [self.completions[sample] for sample in range(self.params.n)]


@dataclass
class Row:
    """One running completion: the columns where its prompt and its sampled tokens begin."""

    request: Request
    sample: int
    start: int
    begin: int


class RowTensors:
    """What a decode step has to know of each of its B rows; `stops_S` end any of them."""

    def __init__(self, rows: Sequence[Row], stops_S: Tensor) -> None:
        params, device = [row.request.params for row in rows], stops_S.device
        self.sampler = RowSampler(params, device)
        longest = max((len(p.stop_token_ids) for p in params), default=0)
        own = (p.stop_token_ids + (-1,) * (longest - len(p.stop_token_ids)) for p in params)
        ints = [(row.start, row.begin, p.max_tokens, *stops) for row, p, stops in zip(rows, params, own, strict=True)]
        # All at once: rows change at nearly every step, and each transfer to a device takes its time.
        ints_BK = torch.from_numpy(np.array(ints, dtype=np.int64).reshape(len(rows), 3 + longest)).to(device)
        self.start_B, self.begin_B, self._limit_B = ints_BK[:, :3].unbind(dim=1)
        self._stops_BS = torch.cat([stops_S.expand(len(rows), -1), ints_BK[:, 3:]], dim=1)

    def endings(self, tokens_B: Tensor, position_B: Tensor) -> dict[int, bool]:
        """The rows that end with these tokens: whether by a stop token, or else at their limit."""
        stopped_B = (tokens_B[:, None] == self._stops_BS).any(dim=1)
        full_B = position_B + 1 >= self._limit_B
        both = (2 * stopped_B + full_B).tolist()  # one transfer from the device
        return {row: ending >= 2 for row, ending in enumerate(both) if ending}
