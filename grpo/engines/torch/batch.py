"""Batch of running completions, the rows: they join, decode one token together, and leave.

`DecodeBatch` runs the model. `TokenGrid` holds what the rows have sampled, on the columns of the KV grid (kv_cache.py).
`RowTensors` holds the parameters of the running rows. A row whose request says so leaves its keys and values to the
next turn of its episode (prefix_cache.py).

Shape suffixes: B running rows   N some rows   R all rows   C columns   T tokens of a completion   S stop tokens
                V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from grpo.engines.base import Limits
from grpo.engines.torch.forward import choose_decoding
from grpo.engines.torch.kv_cache import KVGrid, Prefix, prefill
from grpo.engines.torch.prefix_cache import Episode, KeptPrefix, PrefixCache
from grpo.engines.torch.sampling import RowSampler, uniforms
from grpo.telemetry.recording import span
from grpo.types import Completion, Ints, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLACK_COLUMNS = 64  # the grid is shifted once in so many steps: rare enough not to cost anything
_SMALL_PREFILL = 16  # so many tokens of a prompt take little longer to compute than one


@dataclass(eq=False)
class Request:
    """Group being generated. Its rows join as slots become free; `completions` fills up as they finish."""

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

    def episode(self, sample: int) -> Episode:
        return self.params.seed, self.params.first_sample + sample

    def result(self) -> list[Completion]:
        return [self.completions[sample] for sample in range(self.params.n)]


@dataclass
class Row:
    """Running completion: the columns at which its prompt and its sampled tokens begin."""

    request: Request
    sample: int
    prompt_start: int
    completion_start: int


class DecodeBatch:
    """All running rows of a model. Not thread-safe: the engine calls it from one thread at a time.

    Between steps, the tokens of every row are in columns [prompt_start, end] of the token grid. The newest one, at
    column `end`, has been sampled and has not been run through the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Sequence[int],
        limits: Limits,
        cuda_graphs: bool = True,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self.model = model
        self.version = 0
        self._limits = limits
        self._device = next(model.parameters()).device
        self._stops_S = torch.tensor(list(stop_token_ids), dtype=torch.long, device=self._device)
        max_columns = limits.context + _SLACK_COLUMNS
        self._kv = KVGrid(limits.max_sequences, max_columns)
        self._decoding = choose_decoding(model, self._kv, cuda_graphs=cuda_graphs)
        self._tokens = TokenGrid(limits, max_columns, self._device)
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self._read = self._kept = 0
        self._rows: list[Row] = []
        self._rows_changed()

    @property
    def free_rows(self) -> int:
        return self._limits.max_sequences - len(self._rows)

    @property
    def running(self) -> int:
        return len(self._rows)

    def take_prompt_tokens(self) -> tuple[int, int]:
        """Return how many tokens of prompts were read, and how many were known from kept prefixes, since last asked."""
        counts, self._read, self._kept = (self._read, self._kept), 0, 0
        return counts

    @torch.inference_mode()
    def step(self, joining: Sequence[Request]) -> tuple[list[Request], int]:
        """Sample one token for every running row, and the first token of every row that joins.

        As many rows of the requests join, in order, as there are free slots. Returns the requests that this step
        finished, and the number of tokens sampled.
        """
        # Running and joining rows are sampled together, within the span of the last forward pass.
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
        """Recompute the keys and values of every running row under the current weights."""
        with span("recompute", rows=len(self._rows)):
            sequences = [self._tokens.tokens(i, row, self._kv.end) for i, row in enumerate(self._rows)]
            for i, prefix in enumerate(prefill(self.model, sequences, self.version)):
                self._kv.store(prefix, slice(i, i + 1))

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        self._remove([i for i, row in enumerate(self._rows) if row.request is request])

    def _decode(self) -> Tensor:
        """Return the logits [B, V] of the next token of every row."""
        self._make_room()
        logits_BV = self._decoding(self._tokens.column(self.running, self._kv.end), self._row_tensors.prompt_start_B)
        self._kv.end += 1
        return logits_BV

    def _make_room(self) -> None:
        """Move all rows left when the next column would not fit."""
        if self._kv.end + 1 < self._kv.max_columns:
            return
        # Prompts must still fit before `end`. Only later turns of episodes are longer, and move the rows right again.
        self._shift_left(min(self._kv.first, self._kv.end - self._limits.max_prompt_tokens))

    def _shift_left(self, columns: int) -> None:
        """Move all rows; a negative number moves them right."""
        self._kv.shift_left(columns)
        self._tokens.shift_left(columns)
        for row in self._rows:
            row.prompt_start -= columns
            row.completion_start -= columns
        self._rows_changed()

    def _join(self, requests: Sequence[Request]) -> list[Tensor]:
        """Add rows whose prompts end before column `end`; return the logits [rows, V] of each group's first tokens."""
        longest = max(len(request.prompt_ids) for request in requests)
        if not self._rows:
            self._kv.end = max(longest, self._limits.max_prompt_tokens)
        elif longest > self._kv.end:
            self._shift_left(self._kv.end - longest)
        logits = []
        for request, prefix in self._prefixes(requests):
            # All rows of a group share its prefix.
            first, count = self.running, min(request.to_join, self.free_rows)
            self._kv.store(prefix, slice(first, first + count))
            logits.append(prefix.logits_V.expand(count, -1))
            prompt_start, end, joined = self._kv.end - prefix.length, self._kv.end, request.joined
            self._rows += [Row(request, sample, prompt_start, end) for sample in range(joined, joined + count)]
            self._tokens.add_rows(first, self._rows[first:])
            request.joined += count
            if not request.to_join:
                request.prefix = None
        self._rows_changed()
        return logits

    def _prefixes(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Prefix]]:
        """Yield each request with its prefix, those that continue a kept one first.

        None is computed twice under the same weights. The order is safe: a single row always fits as a whole.
        """
        kept = {request: prefix for request in requests if (prefix := self._kept_prefix(request))}
        yield from self._continued(kept)
        requests = [request for request in requests if request not in kept]
        outdated = [r for r in requests if r.prefix is None or r.prefix.version != self.version]
        self._read += sum(len(request.prompt_ids) for request in outdated)
        computed = prefill(self.model, self._prompts(outdated), self.version)
        for request in requests:
            if request in outdated:
                request.prefix = next(computed)
            assert request.prefix is not None
            yield request, request.prefix

    def _kept_prefix(self, request: Request) -> KeptPrefix | None:
        if request.params.first_token == 0 or request.params.n > 1:
            return None  # the first turn of a group
        return self.prefixes.take(request.episode(0), request.prompt_ids)

    def _continued(self, kept: Mapping[Request, KeptPrefix]) -> Iterator[tuple[Request, Prefix]]:
        """Yield the prefixes of requests of which a part is kept, after computing the rest."""

        def size(request: Request) -> int:
            return (len(request.prompt_ids) - len(kept[request].token_ids)) // _SMALL_PREFILL

        known = sum(len(prefix.token_ids) for prefix in kept.values())
        self._kept += known
        self._read += sum(len(request.prompt_ids) for request in kept) - known
        # Those of similar size together, because as many new tokens are computed for each as for the largest.
        for _, similar in groupby(sorted(kept, key=size), lambda request: size(request).bit_length()):
            together = list(similar)
            states = [kept[request].states for request in together]
            yield from zip(together, prefill(self.model, self._prompts(together), self.version, states), strict=True)

    def _prompts(self, requests: Sequence[Request]) -> list[Tensor]:
        return [torch.tensor(request.prompt_ids, device=self._device) for request in requests]

    def _sample(self, logits: Sequence[Tensor]) -> tuple[list[Request], int]:
        """Draw the token at column `end` of every row from logits [B, V] in parts, and remove the finished rows."""
        end, row_tensors = self._kv.end, self._row_tensors
        position_B = end - row_tensors.completion_start_B
        tokens_B, logprobs_B = row_tensors.sampler.draw(torch.cat(list(logits)), self._tokens.uniforms(position_B))
        self._tokens.write(end, tokens_B, logprobs_B, self.version)
        ended = row_tensors.ended(tokens_B, position_B)
        finished = []
        for i, completion in self._tokens.completions(self._rows, ended, end + 1):
            request, sample = self._rows[i].request, self._rows[i].sample
            request.completions[sample] = completion
            if request.params.keep_prefix:
                computed = np.concatenate([request.prompt_ids, completion.token_ids[:-1]])
                self.prefixes.keep(request.episode(sample), computed, self._kv, i)
            if request.done:
                finished.append(request)
        self._remove(list(ended))
        return finished, len(tokens_B)

    def _remove(self, leaving: Sequence[int]) -> None:
        """Fill the slots of leaving rows with the last rows that stay."""
        if not leaving:
            return
        gone = set(leaving)
        remaining = len(self._rows) - len(gone)
        holes = [i for i in sorted(gone) if i < remaining]
        movers = [i for i in range(remaining, len(self._rows)) if i not in gone]
        if holes:
            targets_N, sources_N = torch.tensor([holes, movers], device=self._device)
            self._kv.move_rows(sources_N, targets_N)
            self._tokens.move_rows(sources_N, targets_N)
            for hole, mover in zip(holes, movers, strict=True):
                self._rows[hole] = self._rows[mover]
        del self._rows[remaining:]
        self._rows_changed()

    def _rows_changed(self) -> None:
        """Update everything derived from `_rows`, after rows have joined, left or moved."""
        self._kv.rows = len(self._rows)
        self._kv.first = min((row.prompt_start for row in self._rows), default=self._kv.end)
        self._row_tensors = RowTensors(self._rows, self._stops_S)


class RowTensors:
    """Parameters of each of the B rows that a decode step needs; `stops_S` are the stop tokens of all rows."""

    def __init__(self, rows: Sequence[Row], stops_S: Tensor) -> None:
        params, device = [row.request.params for row in rows], stops_S.device
        self.sampler = RowSampler(params, device)
        longest = max((len(p.stop_token_ids) for p in params), default=0)
        padded_stops = (p.stop_token_ids + (-1,) * (longest - len(p.stop_token_ids)) for p in params)
        ints = [
            (row.prompt_start, row.completion_start, p.max_tokens, *stops)
            for row, p, stops in zip(rows, params, padded_stops, strict=True)
        ]
        # In one transfer: rows change at nearly every step, and each transfer to a device takes its time.
        ints_BK = torch.from_numpy(np.array(ints, dtype=np.int64).reshape(len(rows), 3 + longest)).to(device)
        self.prompt_start_B, self.completion_start_B, self._max_tokens_B = ints_BK[:, :3].unbind(dim=1)
        self._stops_BS = torch.cat([stops_S.expand(len(rows), -1), ints_BK[:, 3:]], dim=1)

    def ended(self, tokens_B: Tensor, position_B: Tensor) -> dict[int, bool]:
        """Map each row that ends with these tokens to True after a stop token, or False at its limit."""
        stopped_B = (tokens_B[:, None] == self._stops_BS).any(dim=1)
        full_B = position_B + 1 >= self._max_tokens_B
        both = (2 * stopped_B + full_B).tolist()  # one transfer from the device
        return {row: ending >= 2 for row, ending in enumerate(both) if ending}


class TokenGrid:
    """Tokens, log-probabilities and policy versions [R, C], and the random numbers [R, T] of each completion."""

    def __init__(self, limits: Limits, max_columns: int, device: torch.device) -> None:
        shape = (limits.max_sequences, max_columns)
        self._tokens_RC = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs_RC = torch.zeros(shape, device=device)
        self._versions_RC = torch.zeros(shape, dtype=torch.long, device=device)
        self._grids = (self._tokens_RC, self._logprobs_RC, self._versions_RC)
        self._uniforms_RT = torch.zeros(limits.max_sequences, limits.max_completion_tokens, device=device)

    def column(self, rows: int, column: int) -> Tensor:
        """Return the tokens [rows, 1] of one column."""
        return self._tokens_RC[:rows, column : column + 1]

    def tokens(self, i: int, row: Row, end: int) -> Tensor:
        """Return prompt and completion of row `i` up to column `end`."""
        return self._tokens_RC[i, row.prompt_start : end]

    def uniforms(self, position_B: Tensor) -> Tensor:
        """Return the random number [B] of each row for token `position_B` of its completion."""
        return self._uniforms_RT[: len(position_B)].gather(1, position_B[:, None])[:, 0]

    def add_rows(self, first: int, added: Sequence[Row]) -> None:
        """Write prompt and random numbers of rows of one group, from row `first` on."""
        row, rows = added[0], slice(first, first + len(added))
        params = row.request.params
        prompt_T = torch.tensor(row.request.prompt_ids)  # a copy: the array may be read-only
        self._tokens_RC[rows, row.prompt_start : row.completion_start] = prompt_T
        numbers = [
            uniforms(params.seed, params.first_sample + each.sample, params.max_tokens, params.first_token)
            for each in added
        ]
        self._uniforms_RT[rows, : params.max_tokens] = torch.stack(numbers)

    def write(self, column: int, tokens_B: Tensor, logprobs_B: Tensor, version: int) -> None:
        rows = len(tokens_B)
        self._tokens_RC[:rows, column] = tokens_B
        self._logprobs_RC[:rows, column] = logprobs_B
        self._versions_RC[:rows, column] = version

    def completions(self, rows: Sequence[Row], ended: Mapping[int, bool], end: int) -> Iterator[tuple[int, Completion]]:
        """Yield the completions, up to column `end`, of the rows that `ended` by a stop token or at their limit."""
        if not ended:
            return
        # One transfer per grid, from the first column that any of these rows has sampled.
        first = min(rows[i].completion_start for i in ended)
        rows_N = torch.tensor(list(ended), device=self._tokens_RC.device)
        sampled = [grid[:, first:end].index_select(0, rows_N).cpu().numpy() for grid in self._grids]
        for (i, stopped), *columns in zip(ended.items(), *sampled, strict=True):
            token_ids, logprobs, versions = (values[rows[i].completion_start - first :].copy() for values in columns)
            runs = tuple((version, len(list(run))) for version, run in groupby(versions.tolist()))
            yield i, Completion(token_ids, logprobs, runs, "stop" if stopped else "length")

    def move_rows(self, sources_N: Tensor, targets_N: Tensor) -> None:
        for grid in (*self._grids, self._uniforms_RT):
            grid[targets_N] = grid[sources_N]

    def shift_left(self, columns: int) -> None:
        for grid in self._grids:
            grid.copy_(grid.roll(-columns, dims=1))  # what wraps around belongs to no row
