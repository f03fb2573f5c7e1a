"""From groups to samples, and to what the loss is given of a micro-batch of them."""

# MERGED: What each optimizer step is made of, and which part of it is whose.
# MERGED: Which rank trains on which groups.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from grpo.types import Completion, Floats, Group, Ints
from grpo.utils.ranks import Ranks

if TYPE_CHECKING:
    from grpo.learner.objective import Objective


@dataclass(frozen=True)
class Sample:
    """One completion and its prompt. The per-token arrays have shape [T], T tokens of the completion."""

    prompt_ids: Ints
    token_ids: Ints  # [T]
    behavior_logprobs: Floats
    versions: Ints
    advantage: float = 0.0
    reference_logprobs: Floats | None = None
    proximal_logprobs: Floats | None = None
    trained: bool = True

    @property
    def trained_length(self) -> int:
        """How many tokens are trained on."""
        return len(self.token_ids) if self.trained else 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of B completions, the longest of which has K; the mask is set where there is one."""

    mask_BK: Tensor
    behavior_logprobs_BK: Tensor
    advantages_BK: Tensor
    versions_BK: Tensor
    reference_logprobs_BK: Tensor | None
    proximal_logprobs_BK: Tensor | None

    def unflatten(self, values_N: Tensor) -> Tensor:
        """[B, K] of values for all tokens, completion after completion; zero where there is none. Differentiable."""
        return values_N.new_zeros(self.mask_BK.shape).masked_scatter(self.mask_BK, values_N)


def samples_of(group: Group) -> list[Sample]:
    references: Iterable[Floats | None] = group.reference_logprobs or [None] * len(group.completions)
    return [
        make_sample(group.prompt.token_ids, completion, advantage, reference, trained=i not in group.masked)
        for i, (completion, advantage, reference) in enumerate(
            zip(group.completions, group.advantages, references, strict=True)
        )
    ]


def make_sample(
    prompt_ids: Ints,
    completion: Completion,
    advantage: float = 0.0,
    reference_logprobs: Floats | None = None,
    *,
    trained: bool = True,
) -> Sample:
    versions, counts = zip(*completion.versions, strict=True)
    return Sample(
        prompt_ids=prompt_ids,
        token_ids=completion.token_ids,
        behavior_logprobs=completion.logprobs,
        versions=np.repeat(versions, counts),
        advantage=advantage,
        reference_logprobs=reference_logprobs,
        trained=trained,
    )


def collate(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    lengths_B1 = torch.tensor([[len(sample.token_ids)] for sample in samples])
    mask_BK = torch.arange(int(lengths_B1.max())) < lengths_B1

    def unflatten(arrays: Iterable[np.ndarray], dtype: torch.dtype) -> Tensor:
        values_BK = torch.zeros(mask_BK.shape, dtype=dtype)
        values_BK[mask_BK] = torch.from_numpy(np.concatenate(list(arrays))).to(dtype)
        return values_BK.to(device)

    def spread_if_there(arrays: Iterable[np.ndarray | None]) -> Tensor | None:
        there = [array for array in arrays if array is not None]
        return unflatten(there, torch.float32) if there else None

    return MicroBatch(
        mask_BK=mask_BK.to(device),
        behavior_logprobs_BK=unflatten((sample.behavior_logprobs for sample in samples), torch.float32),
        advantages_BK=torch.tensor([[sample.advantage] for sample in samples], device=device).expand(mask_BK.shape),
        versions_BK=unflatten((sample.versions for sample in samples), torch.long),
        reference_logprobs_BK=spread_if_there(sample.reference_logprobs for sample in samples),
        proximal_logprobs_BK=spread_if_there(sample.proximal_logprobs for sample in samples),
    )


@dataclass(frozen=True)
class RankBatch:
    """What one update is made of: this rank's samples that cost a forward pass, and what their loss is divided by.

    Every rank makes as many passes as the one with the most micro-batches: after its own,
    `dummy_passes` over `dummy_sample`, whose gradients are zero. Without a dummy sample no rank has work.
    """

    samples: Sequence[Sample]
    denominator: float
    dummy_passes: int
    dummy_sample: Sequence[Sample]


def split_batch(
    ranks: Ranks,
    groups: Sequence[Sequence[Sample]],
    scale: float,
    objective: Objective,
    plan: Callable[[Sequence[Sample]], list[list[int]]],
) -> RankBatch:
    """A rank's part of the update on `groups`: whole ones, of about as many tokens as the others'.

    Advantages are multiplied by `scale`. `plan` splits samples into micro-batches; each rank makes the plans of all, so
    that it knows of their passes without asking.
    """
    trained = [_trained(group, scale, objective) for group in groups]
    costs = [sum(map(len, group)) for group in trained]
    by_rank = [[sample for i in part for sample in trained[i]] for part in balanced(costs, ranks.size)]
    passes = [len(plan(samples)) for samples in by_rank]
    return RankBatch(
        samples=by_rank[ranks.rank],
        denominator=objective.denominator([sample.trained_length for group in groups for sample in group]),
        dummy_passes=max(passes) - passes[ranks.rank],
        dummy_sample=sorted((sample for group in trained for sample in group), key=len)[:1],
    )


def _trained(group: Sequence[Sample], scale: float, objective: Objective) -> list[Sample]:
    """Those of a group that cost a forward pass."""
    trained = [s for s in group if s.trained and (s.advantage != 0 or objective.trains_zero_advantage)]
    return [replace(sample, advantage=scale * sample.advantage) for sample in trained]


def balanced(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices into `costs`, in order, for each of `parts`, whose sums are about the same.

    The longest goes first, and each to the part that has least: at most 4/3 of the best there is for the part that has
    most (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    loads, chosen = [0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        chosen[least].append(i)
    return [sorted(part) for part in chosen]
