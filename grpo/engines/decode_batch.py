"""The synchronous heart of the embedded engine: rows join, decode one token together, and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grpo.engines.kv_grid import KVGrid, cache_argument
from grpo.engines.sampling import RowSampler, uniforms
from grpo.telemetry.recording import span
from grpo.types import Completion, Ints, SamplingParams

if TYPE_CHECKING:  # the module behind it takes a second to import
    from transformers import PreTrainedModel

_SLACK_COLUMNS = 64  # the grid is shifted once in so many steps: rare enough not to show
_PREFILL_TOKENS = 8192  # prefixes computed in one forward pass: bounds its memory


@dataclass(eq=False)
class Request:
    """One group being generated: `completions` fills up as its rows finish."""

    prompt_ids: Ints
    params: SamplingParams
    arrived_s: float = 0.0  # of time.perf_counter
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.completions) == self.params.n

    def result(self) -> list[Completion]:
        return [self.completions[sample] for sample in range(self.params.n)]


@dataclass
class _Row:
    """One running completion: the columns where its prompt and its sampled tokens begin."""

    request: Request
    sample: int
    start: int
    begin: int


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
    ) -> None:
        self.model = model
        self.version = 0
        self.max_rows = max_rows
        self.max_prompt_tokens, self.max_completion_tokens = max_prompt_tokens, max_completion_tokens
        self.device = next(model.parameters()).device
        self._stop_token_ids = tuple(stop_token_ids)
        self._cache_argument = cache_argument(model)
        self._kv = KVGrid(max_rows, max_prompt_tokens + max_completion_tokens + _SLACK_COLUMNS)
        self._kv.end = max_prompt_tokens
        grid = (max_rows, self._kv.max_columns)
        self._tokens_RC = torch.zeros(grid, dtype=torch.long, device=self.device)
        self._logprobs_RC = torch.zeros(grid, device=self.device)
        self._versions_RC = torch.zeros(grid, dtype=torch.long, device=self.device)
        self._uniforms_RT = torch.zeros(max_rows, max_completion_tokens, device=self.device)
        self._rows: list[_Row] = []

    @property
    def free_rows(self) -> int:
        return self.max_rows - len(self._rows)

    @property
    def running(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def step(self, joining: Sequence[Request]) -> tuple[list[Request], int]:
        """Decode one token for every running row, then let new groups join with their first token.

        Returns the requests that this finished, and the number of tokens sampled.
        """
        sampled, finished = 0, []
        if self._rows:
            sampled += len(self._rows)
            with span("decode", rows=len(self._rows)):
                finished += self._decode()
        if joining:
            sampled += sum(request.params.n for request in joining)
            with span("prefill", rows=sum(request.params.n for request in joining), groups=len(joining)):
                finished += self._join(joining)
        return finished, sampled

    @torch.inference_mode()
    def recompute(self) -> None:
        """Rebuild every running row's keys and values under the present weights."""
        if not self._rows:
            return
        with span("recompute", rows=len(self._rows)):
            first, end = self._kv.first, self._kv.end
            starts_B = torch.tensor([row.start for row in self._rows], device=self.device)
            self._prefill(self._tokens_RC[: self.running, first:end], starts_B, [[i] for i in range(self.running)])

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        self._remove([i for i, row in enumerate(self._rows) if row.request is request])

    def _decode(self) -> list[Request]:
        self._make_room()
        rows, first, end = self._kv.rows, self._kv.first, self._kv.end
        columns_C = torch.arange(first, end + 1, device=self.device)
        logits_BV = self.model(
            input_ids=self._tokens_RC[:rows, end : end + 1],
            attention_mask=(columns_C >= self._start_B[:, None]).long(),
            position_ids=(end - self._start_B)[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._kv.cache()},
        ).logits[:, -1]
        self._kv.end += 1
        return self._sample(logits_BV, torch.arange(rows, device=self.device), self._sampler)

    def _join(self, requests: Sequence[Request]) -> list[Request]:
        if not self._rows:
            self._kv.first = self._kv.end = self.max_prompt_tokens
        end, before = self._kv.end, self.running
        width = max(len(request.prompt_ids) for request in requests)
        tokens_BT = torch.zeros(len(requests), width, dtype=torch.long, device=self.device)
        starts, targets, sources = [], [], []
        for i, request in enumerate(requests):
            length = len(request.prompt_ids)
            tokens_BT[i, width - length :] = torch.tensor(request.prompt_ids)  # a copy: it may be read-only
            starts.append(end - length)
            targets.append(list(range(self.running, self.running + request.params.n)))
            sources += [i] * request.params.n
            self._rows += [_Row(request, sample, end - length, end) for sample in range(request.params.n)]
        logits_BV = self._prefill(tokens_BT, torch.tensor(starts, device=self.device), targets)

        rows_N = torch.arange(before, self.running, device=self.device)
        self._tokens_RC[rows_N, end - width : end] = tokens_BT[sources]
        for i, row in enumerate(self._rows[before:], start=before):
            params = row.request.params
            self._uniforms_RT[i, : params.max_tokens] = uniforms(params.seed, row.sample, params.max_tokens)
        self._refresh()
        sampler = RowSampler([row.request.params for row in self._rows[before:]], self.device)
        return self._sample(logits_BV[sources], rows_N, sampler)

    def _prefill(self, tokens_BT: Tensor, starts_B: Tensor, targets: list[list[int]]) -> Tensor:
        """Run prefixes that end before column `end` and keep their keys and values; returns the last logits [B, V]."""
        width = tokens_BT.shape[1]
        columns_T = torch.arange(self._kv.end - width, self._kv.end, device=self.device)
        logits, chunk = [], max(1, _PREFILL_TOKENS // width)
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            prefix = DynamicCache()
            output = self.model(
                input_ids=tokens_BT[part],
                attention_mask=(columns_T >= starts_B[part, None]).long(),
                position_ids=(columns_T - starts_B[part, None]).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_argument: prefix},
            )
            logits.append(output.logits[:, -1])
            pairs = [(source, row) for source, rows in enumerate(targets[part]) for row in rows]
            sources_N, rows_N = torch.tensor(pairs, device=self.device).unbind(dim=1)
            self._kv.store(prefix, sources_N, rows_N)
        return torch.cat(logits)

    def _sample(self, logits_BV: Tensor, rows_B: Tensor, sampler: RowSampler) -> list[Request]:
        """Draw the token at column `end` for `rows_B` and let the finished rows leave."""
        end = self._kv.end
        position_B = end - self._begin_B[rows_B]
        tokens_B, logprobs_B = sampler.draw(logits_BV, self._uniforms_RT[rows_B, position_B])
        self._tokens_RC[rows_B, end] = tokens_B
        self._logprobs_RC[rows_B, end] = logprobs_B
        self._versions_RC[rows_B, end] = self.version
        stopped_B = (tokens_B[:, None] == self._stops_BS[rows_B]).any(dim=1)
        full_B = position_B + 1 >= self._limit_B[rows_B]
        leaving, by_stop = rows_B[stopped_B | full_B].tolist(), set(rows_B[stopped_B].tolist())
        if not leaving:
            return []
        finished = []
        for i in leaving:
            row = self._rows[i]
            row.request.completions[row.sample] = self._completion(i, row, stopped=i in by_stop)
            if row.request.done:
                finished.append(row.request)
        self._remove(leaving)
        return finished

    def _completion(self, i: int, row: _Row, stopped: bool) -> Completion:
        span = slice(row.begin, self._kv.end + 1)
        versions = self._versions_RC[i, span].tolist()
        return Completion(
            token_ids=self._tokens_RC[i, span].cpu().numpy().copy(),
            logprobs=self._logprobs_RC[i, span].cpu().numpy().copy(),
            versions=tuple((version, len(list(run))) for version, run in groupby(versions)),
            finish_reason="stop" if stopped else "length",
        )

    def _remove(self, leaving: Sequence[int]) -> None:
        """Fill the places of leaving rows with the last rows that stay."""
        gone = set(leaving)
        remaining = len(self._rows) - len(gone)
        holes = [i for i in sorted(gone) if i < remaining]
        movers = [i for i in range(remaining, len(self._rows)) if i not in gone]
        if holes:
            rows_N, sources_N = torch.tensor([holes, movers], device=self.device)
            self._kv.move_rows(sources_N, rows_N)
            for grid in (self._tokens_RC, self._logprobs_RC, self._versions_RC, self._uniforms_RT):
                grid[rows_N] = grid[sources_N]
            for hole, mover in zip(holes, movers, strict=True):
                self._rows[hole] = self._rows[mover]
        del self._rows[remaining:]
        if gone:
            self._refresh()

    def _make_room(self) -> None:
        """Move the used columns left when the next column would not fit."""
        if self._kv.end + 1 < self._kv.max_columns:
            return
        # A prompt of full length must still fit before `end`.
        columns = min(self._kv.first, self._kv.end - self.max_prompt_tokens)
        first, end = self._kv.first, self._kv.end
        self._kv.shift_left(columns)
        for grid in (self._tokens_RC, self._logprobs_RC, self._versions_RC):
            grid[: self.running, first - columns : end + 1 - columns] = grid[: self.running, first : end + 1].clone()
        for row in self._rows:
            row.start -= columns
            row.begin -= columns
        self._kv.end -= columns
        self._refresh()

    def _refresh(self) -> None:
        """Bring what the step needs per row into tensors, after rows have joined, left or moved."""
        rows = self._rows
        self._kv.rows = len(rows)
        self._kv.first = min((row.start for row in rows), default=self._kv.end)
        self._start_B = torch.tensor([row.start for row in rows], device=self.device)
        self._begin_B = torch.tensor([row.begin for row in rows], device=self.device)
        self._limit_B = torch.tensor([row.request.params.max_tokens for row in rows], device=self.device)
        stops = [self._stop_token_ids + row.request.params.stop_token_ids for row in rows]
        longest = max((len(ids) for ids in stops), default=0)
        padded = [ids + (-1,) * (longest - len(ids)) for ids in stops]
        self._stops_BS = torch.tensor(padded, dtype=torch.long, device=self.device).view(len(rows), longest)
        self._sampler = RowSampler([row.request.params for row in rows], self.device)
