"""What each optimizer step is made of, and which part of it is whose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from grpo.learner.balance import balanced
from grpo.learner.collate import Sample
from grpo.learner.objective import Objective
from grpo.learner.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """What one update is made of: this rank's samples that cost a forward pass, and what their loss is divided by.

    Every rank makes as many passes as the one with the most micro-batches: after its own, `idle_passes` over `filler`,
    of which nothing comes. Without a filler there is nothing to do for any rank.
    """

    samples: Sequence[Sample]
    denominator: float
    idle_passes: int
    filler: Sequence[Sample]


def share_of(
    ranks: Ranks,
    groups: Sequence[Sequence[Sample]],
    scale: float,
    objective: Objective,
    plan: Callable[[Sequence[Sample]], list[list[int]]],
) -> Share:
    """A rank's part of the update on `groups`: whole ones, of about as many tokens as the others'.

    Advantages are multiplied by `scale`. `plan` splits samples into micro-batches; each rank makes the plans of all, so
    that it knows of their passes without asking.
    """
    trained = [_trained(group, scale, objective) for group in groups]
    costs = [sum(map(len, group)) for group in trained]
    by_rank = [[sample for i in part for sample in trained[i]] for part in balanced(costs, ranks.size)]
    passes = [len(plan(samples)) for samples in by_rank]
    return Share(
        samples=by_rank[ranks.rank],
        denominator=objective.denominator([sample.trained_length for group in groups for sample in group]),
        idle_passes=max(passes) - passes[ranks.rank],
        filler=sorted((sample for group in trained for sample in group), key=len)[:1],
    )


def _trained(group: Sequence[Sample], scale: float, objective: Objective) -> list[Sample]:
    """Those of a group that cost a forward pass."""
    trained = [s for s in group if s.trained and (s.advantage != 0 or objective.trains_zero_advantage)]
    return [replace(sample, advantage=scale * sample.advantage) for sample in trained]
