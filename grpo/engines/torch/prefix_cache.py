"""Keys and values of finished turns, kept for a while so that the next turn of an episode reads only what is new.

    turn 1 ends       keep(episode, tokens of its prompt and of what was sampled)
    turn 2 begins     take(episode, its prompt): the same tokens, then the reply, of which nothing is known
    turn 2 ends       keep(episode, all these tokens and what was sampled since)

The turns that ended longest ago make room for new ones.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from grpo.engines.torch.kv_cache import KVGrid, States
from grpo.types import Ints

Episode = tuple[int, int]
"""Seed of the group, and number of the sample within it."""


@dataclass(frozen=True)
class KeptPrefix:
    """Token ids [L] and the keys and values that a model has computed for them."""

    token_ids: Ints
    states: States
    size: int

    def begins(self, prompt_ids: Ints) -> bool:
        """Return whether a prompt consists of these tokens and at least one more."""
        count = len(self.token_ids)
        return count < len(prompt_ids) and np.array_equal(self.token_ids, prompt_ids[:count])


class PrefixCache:
    """At most `max_bytes` of keys and values; at most one prefix per episode. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Episode, KeptPrefix] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, episode: Episode, token_ids: Ints, kv: KVGrid, row: int) -> None:
        """Copy the last columns of a row of the grid, which belong to `token_ids` [L]. Replaces an older prefix."""
        self._drop(episode)
        size = len(token_ids) * kv.column_bytes
        if size > self._max_bytes:
            return
        while self.bytes + size > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[episode] = KeptPrefix(token_ids, kv.copy(row, kv.end - len(token_ids)), size)
        self.bytes += size

    def take(self, episode: Episode, prompt_ids: Ints) -> KeptPrefix | None:
        """Remove and return the prefix of an episode, or None if there is none or the prompt goes on from another."""
        kept = self._drop(episode)
        return kept if kept is not None and kept.begins(prompt_ids) else None

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0

    def _drop(self, episode: Episode) -> KeptPrefix | None:
        kept = self._kept.pop(episode, None)
        self.bytes -= kept.size if kept else 0
        return kept
