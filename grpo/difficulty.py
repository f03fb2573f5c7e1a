"""Which problems there is nothing to learn from at present."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from grpo.types import Prompt


class Difficulty:
    """Remembers the problems whose last group earned one reward throughout: solved always, or never.

    Such a group has no advantages, so the dataloader leaves its problem out of the stream, but for a share of its turns
    (`dataloader.revisit`): there it shows whether the problem has become easy or hard enough since.
    """

    def __init__(self, left_out: Iterable[int] = ()) -> None:
        self._left_out = set(left_out)

    @property
    def left_out(self) -> frozenset[int]:
        """The problems as they are now, by their index in the task."""
        return frozenset(self._left_out)

    def learned(self, prompt: Prompt, rewards: Sequence[float]) -> None:
        """The last group of a problem is the one that counts."""
        if min(rewards) == max(rewards):
            self._left_out.add(prompt.problem_index)
        else:
            self._left_out.discard(prompt.problem_index)

    def state(self) -> list[int]:
        """As JSON can hold it, and the constructor takes it."""
        return sorted(self._left_out)
