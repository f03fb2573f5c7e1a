"""The synchronous heart of the embedded engine: rows join, decode one token together, and leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo.engines.decoding import decoding_for
from grpo.engines.kv_grid import KVGrid
from grpo.engines.prefixes import Prefix, read_prefixes
from grpo.engines.requests import Request, Row, RowTensors
from grpo.engines.token_grid import TokenGrid
from grpo.telemetry.recording import span

if TYPE_CHECKING:  # the module behind it takes a second to import
    from transformers import PreTrainedModel

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
            for i, prefix in enumerate(read_prefixes(self.model, sequences, self.version)):
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
        fresh = read_prefixes(self.model, prompts, self.version)
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
