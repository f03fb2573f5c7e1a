"""What the running rows have sampled, on the columns of the KV grid."""

from __future__ import annotations

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

    def join(self, i: int, row: Row) -> None:
        params = row.request.params
        self._tokens_RC[i, row.start : row.begin] = torch.tensor(row.request.prompt_ids)  # a copy: it may be read-only
        self._uniforms_RT[i, : params.max_tokens] = uniforms(params.seed, row.sample, params.max_tokens)

    def write(self, column: int, tokens_B: Tensor, logprobs_B: Tensor, version: int) -> None:
        rows = len(tokens_B)
        self._tokens_RC[:rows, column] = tokens_B
        self._logprobs_RC[:rows, column] = logprobs_B
        self._versions_RC[:rows, column] = version

    def completion(self, i: int, row: Row, end: int, *, stopped: bool) -> Completion:
        """What row `i` has sampled up to column `end`."""
        span = slice(row.begin, end)
        versions = self._versions_RC[i, span].tolist()
        return Completion(
            token_ids=self._tokens_RC[i, span].cpu().numpy().copy(),
            logprobs=self._logprobs_RC[i, span].cpu().numpy().copy(),
            versions=tuple((version, len(list(run))) for version, run in groupby(versions)),
            finish_reason="stop" if stopped else "length",
        )

    def move_rows(self, sources_N: Tensor, rows_N: Tensor) -> None:
        for grid in (self._tokens_RC, self._logprobs_RC, self._versions_RC, self._uniforms_RT):
            grid[rows_N] = grid[sources_N]

    def shift_left(self, columns: int) -> None:
        for grid in (self._tokens_RC, self._logprobs_RC, self._versions_RC):
            grid[:, :-columns] = grid[:, columns:].clone()  # source and target overlap
