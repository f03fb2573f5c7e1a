"""What the actors of a simulation share: the profile, who computes at the moment, what calls cost; and completions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grpo.config import RunConfig
from grpo.tuning.machine import Calls, Worker
from grpo.tuning.profile import GroupShape, Profile


class World:
    """What the actors of one simulation share."""

    def __init__(self, profile: Profile, config: RunConfig) -> None:
        self.profile, self.config = profile, config
        self.calls = Calls(profile.call, profile.call_driver)
        self.trainer = Worker(self._speed_of_trainer)
        self.generators: list[Worker] = []

    def generator(self) -> Worker:
        worker = Worker(lambda: 1 / (1 + self.profile.decode_slowed * self.trainer.busy))
        self.generators.append(worker)
        if self.profile.train_slowed:
            worker.felt_by.append(self.trainer)
        if self.profile.decode_slowed:
            self.trainer.felt_by.append(worker)
        return worker

    def shape(self, serial: int) -> GroupShape:
        """That of the group of a prompt."""
        groups = self.profile.groups
        return groups[serial % len(groups)].of_size(self.config.rollout.group_size)

    def _speed_of_trainer(self) -> float:
        busy = sum(worker.busy for worker in self.generators) / max(1, len(self.generators))
        return 1 / (1 + self.profile.train_slowed * busy)


@dataclass(frozen=True)
class _Tokens:
    token_ids: range


@dataclass(frozen=True)
class ShapedCompletions:
    """Of which only the number of tokens can be read."""

    shape: GroupShape

    def __iter__(self) -> Iterator[_Tokens]:
        return (_Tokens(range(length)) for length in self.shape.lengths)
