"""What the embedded engine is asked for: groups, and the rows that sample their completions."""

# MERGED: What the running rows have sampled, on the columns of the KV grid.
# MERGED: The synchronous heart of the embedded engine: rows join, decode one token together, and leave.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from grpo.engines.torch.forward import decoding_for
from grpo.engines.torch.kv_cache import KVGrid, Prefix, prefill
from grpo.engines.torch.sampling import RowSampler, uniforms
from grpo.telemetry.recording import span
from grpo.types import Completion, Ints, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class TokenGrid:
    """Tokens, log-probabilities and policy versions [rows, columns], and the random numbers still to come."""

    def __init__(self, max_rows: int, max_columns: int, max_completion_tokens: int, device: torch.device) -> None:
        grid = (max_rows, max_columns)
        self._tokens_RC = torch.zeros(grid, dtype=torch.long, device=device)
        self._logprobs_RC = torch.zeros(grid, device=device)
        self._versions_RC = torch.zeros(grid, dtype=torch.long, device=device)
        self._uniforms_RT = torch.zeros(max_rows, max_completion_tokens, device=device)

    def column(self, rows: int, column: int) -> Tensor:
        """The tokens [rows, 1] there."""
        return self._tokens_RC[:rows, column : column + 1]

    def tokens(self, i: int, row: Row, end: int) -> Tensor:
        """Prompt and completion of row `i` up to column `end`."""
        return self._tokens_RC[i, row.start : end]

    def uniforms(self, position_B: Tensor) -> Tensor:
        """The random number [B] of each row for token `position_B` of its completion."""
        return self._uniforms_RT[: len(position_B)].gather(1, position_B[:, None])[:, 0]

    def join(self, first: int, joining: Sequence[Row]) -> None:
        """Rows of one group, from row `first` on."""
        row, rows = joining[0], slice(first, first + len(joining))
        params = row.request.params
        self._tokens_RC[rows, row.start : row.begin] = torch.tensor(
            row.request.prompt_ids
        )  # a copy: it may be read-only
        numbers = [uniforms(params.seed, each.sample, params.max_tokens) for each in joining]
        self._uniforms_RT[rows, : params.max_tokens] = torch.stack(numbers)

    def write(self, column: int, tokens_B: Tensor, logprobs_B: Tensor, version: int) -> None:
        rows = len(tokens_B)
        self._tokens_RC[:rows, column] = tokens_B
        self._logprobs_RC[:rows, column] = logprobs_B
        self._versions_RC[:rows, column] = version

    def completions(
        self, rows: Sequence[Row], leaving: Mapping[int, bool], end: int
    ) -> Iterator[tuple[Row, Completion]]:
        """What those that are `leaving`, by a stop token or at their limit, have sampled up to column `end`."""
        if not leaving:
            return
        first = min(rows[i].begin for i in leaving)
        rows_N = torch.tensor(list(leaving), device=self._tokens_RC.device)
        grids = (self._tokens_RC, self._logprobs_RC, self._versions_RC)
        sampled = [grid[:, first:end].index_select(0, rows_N).cpu().numpy() for grid in grids]
        for (i, stopped), *columns in zip(leaving.items(), *sampled, strict=True):
            token_ids, logprobs, versions = (values[rows[i].begin - first :].copy() for values in columns)
            runs = tuple((version, len(list(run))) for version, run in groupby(versions.tolist()))
            yield rows[i], Completion(token_ids, logprobs, runs, "stop" if stopped else "length")

    def move_rows(self, sources_N: Tensor, rows_N: Tensor) -> None:
        for grid in (self._tokens_RC, self._logprobs_RC, self._versions_RC, self._uniforms_RT):
            grid[rows_N] = grid[sources_N]

    def shift_left(self, columns: int) -> None:
        for grid in (self._tokens_RC, self._logprobs_RC, self._versions_RC):
            grid[:, :-columns] = grid[:, columns:].clone()  # source and target overlap


_SLACK_COLUMNS = 64  # the grid is shifted once in so many steps: rare enough not to show


class DecodeBatch:
    """All running rows of a model. Not thread-safe: the engine calls it from one thread at a time.

    Between steps every row's tokens stand in columns [start, end] of the token grid; the newest, at column `end`,
    has been sampled and not yet been run through the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Sequence[int],
        max_rows: int,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.version = 0
        self.max_rows, self.max_prompt_tokens = max_rows, max_prompt_tokens
        self.device = next(model.parameters()).device
        self._stops_S = torch.tensor(list(stop_token_ids), dtype=torch.long, device=self.device)
        columns = max_prompt_tokens + max_completion_tokens + _SLACK_COLUMNS
        self._kv = KVGrid(max_rows, columns)
        self._decoding = decoding_for(model, self._kv, cuda_graphs=cuda_graphs)
        self._tokens = TokenGrid(max_rows, columns, max_completion_tokens, self.device)
        self._rows: list[Row] = []
        self._refresh()

    @property
    def free_rows(self) -> int:
        return self.max_rows - len(self._rows)

    @property
    def running(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def step(self, joining: Sequence[Request]) -> tuple[list[Request], int]:
        """Sample one token for every running row, and the first one of every row that joins.

        As many rows of the requests join, in order, as there are places. Returns the requests that this finished, and
        the number of tokens sampled.
        """
        decoded = []
        if self._rows:
            with span("decode", rows=self.running):
                decoded.append(self._decode())
                if not joining:
                    return self._sample(decoded)
        if joining:
            rows = min(sum(request.to_join for request in joining), self.free_rows)
            with span("prefill", rows=rows, groups=len(joining)):
                return self._sample([*decoded, *self._join(joining)])
        return [], 0

    @torch.inference_mode()
    def recompute(self) -> None:
        """Rebuild every running row's keys and values under the present weights."""
        with span("recompute", rows=len(self._rows)):
            sequences = [self._tokens.tokens(i, row, self._kv.end) for i, row in enumerate(self._rows)]
            for i, prefix in enumerate(prefill(self.model, sequences, self.version)):
                self._kv.store(prefix, slice(i, i + 1))

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        self._remove([i for i, row in enumerate(self._rows) if row.request is request])

    def _decode(self) -> Tensor:
        """The logits [B, V] of the next token of every row."""
        self._make_room()
        logits_BV = self._decoding(self._tokens.column(self.running, self._kv.end), self._of_rows.start_B)
        self._kv.end += 1
        return logits_BV

    def _join(self, requests: Sequence[Request]) -> list[Tensor]:
        """Let rows join whose prompts end before column `end`; the logits [rows, V] of each group's first tokens."""
        if not self._rows:
            self._kv.end = self.max_prompt_tokens
        logits = []
        for request, prefix in zip(requests, self._prefixes(requests), strict=True):
            first, count = self.running, min(request.to_join, self.free_rows)
            self._kv.store(prefix, slice(first, first + count))
            logits.append(prefix.logits_V.expand(count, -1))
            start, begin, joined = self._kv.end - prefix.length, self._kv.end, request.joined
            self._rows += [Row(request, sample, start, begin) for sample in range(joined, joined + count)]
            self._tokens.join(first, self._rows[first:])
            request.joined += count
            if not request.to_join:
                request.prefix = None
        self._refresh()
        return logits

    def _prefixes(self, requests: Sequence[Request]) -> Iterator[Prefix]:
        """The prompts, of which none is read twice under the same weights."""
        unread = [r for r in requests if r.prefix is None or r.prefix.version != self.version]
        prompts = [torch.tensor(request.prompt_ids, device=self.device) for request in unread]
        fresh = prefill(self.model, prompts, self.version)
        for request in requests:
            if request in unread:
                request.prefix = next(fresh)
            assert request.prefix is not None
            yield request.prefix

    def _sample(self, logits: Sequence[Tensor]) -> tuple[list[Request], int]:
        """Draw the token at column `end` of every row from logits [B, V] in parts, and let the finished rows leave."""
        end, rows = self._kv.end, self._of_rows
        position_B = end - rows.begin_B
        tokens_B, logprobs_B = rows.sampler.draw(torch.cat(list(logits)), self._tokens.uniforms(position_B))
        self._tokens.write(end, tokens_B, logprobs_B, self.version)
        leaving = rows.endings(tokens_B, position_B)
        finished = []
        for row, completion in self._tokens.completions(self._rows, leaving, end + 1):
            row.request.completions[row.sample] = completion
            if row.request.done:
                finished.append(row.request)
        self._remove(list(leaving))
        return finished, len(tokens_B)

    def _remove(self, leaving: Sequence[int]) -> None:
        """Fill the places of leaving rows with the last rows that stay."""
        if not leaving:
            return
        gone = set(leaving)
        remaining = len(self._rows) - len(gone)
        holes = [i for i in sorted(gone) if i < remaining]
        movers = [i for i in range(remaining, len(self._rows)) if i not in gone]
        if holes:
            rows_N, sources_N = torch.tensor([holes, movers], device=self.device)
            self._kv.move_rows(sources_N, rows_N)
            self._tokens.move_rows(sources_N, rows_N)
            for hole, mover in zip(holes, movers, strict=True):
                self._rows[hole] = self._rows[mover]
        del self._rows[remaining:]
        self._refresh()

    def _make_room(self) -> None:
        """Move the used columns left when the next column would not fit."""
        if self._kv.end + 1 < self._kv.max_columns:
            return
        # A prompt of full length must still fit before `end`.
        columns = min(self._kv.first, self._kv.end - self.max_prompt_tokens)
        self._kv.shift_left(columns)
        self._tokens.shift_left(columns)
        for row in self._rows:
            row.start -= columns
            row.begin -= columns
        self._refresh()

    def _refresh(self) -> None:
        """After rows have joined, left or moved."""
        self._kv.rows = len(self._rows)
        self._kv.first = min((row.start for row in self._rows), default=self._kv.end)
        self._of_rows = RowTensors(self._rows, self._stops_S)
