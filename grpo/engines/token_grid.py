"""What the running rows have sampled, on the columns of the KV grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from grpo.engines.requests import Row
from grpo.engines.sampling import uniforms
from grpo.types import Completion


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
