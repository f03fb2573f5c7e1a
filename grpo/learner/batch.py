"""Training data: groups become samples, a batch is split over ranks, and samples are collated into micro-batches.

The model reads all tokens of a completion. Everything after that, the loss and all metrics included, sees only those
that were sampled: log-probabilities at given tokens are not even computed.

Shapes: B completions; K sampled tokens of the longest of them; N sampled tokens in all, or of one completion with T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo.types import Completion, Floats, Group, Ints
from grpo.utils.ranks import Ranks

Plan = Callable[[Sequence["Sample"]], list[list[int]]]
"""Splits samples, by index, into micro-batches."""


@dataclass(frozen=True)
class Sample:
    """One completion and its prompt.

    Example:
        sample = Sample(prompt_ids=np.array([5, 8]), token_ids=np.array([7, 1]), advantage=0.5,
                        behavior_logprobs=np.array([-0.1, -2.3], np.float32), versions=np.array([3, 4]))
        len(sample)            # 4: tokens that the model reads
        sample.trained_length  # 2: tokens that the loss counts
    """

    prompt_ids: Ints
    token_ids: Ints
    """[T]: sampled and given tokens."""
    behavior_logprobs: Floats
    """[N], as all arrays below: one value for each sampled token."""
    versions: Ints
    """Version of the weights that sampled each token."""
    sampled_places: Ints | None = None
    """Indices of the sampled tokens in `token_ids`; None: all were sampled."""
    advantage: float = 0.0
    reference_logprobs: Floats | None = None
    proximal_logprobs: Floats | None = None
    trained: bool = True

    @property
    def trained_length(self) -> int:
        """Number of tokens that are trained on."""
        return self.sampled_count if self.trained else 0

    @property
    def sampled_count(self) -> int:
        return len(self.behavior_logprobs)

    @property
    def places(self) -> Ints:
        """Indices [N] of the sampled tokens in `token_ids`."""
        return np.arange(len(self.token_ids)) if self.sampled_places is None else self.sampled_places

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


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
        sampled_places=completion.sampled_places() if completion.turns else None,
        advantage=advantage,
        reference_logprobs=reference_logprobs,
        trained=trained,
    )


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of an update: the samples that cost a forward pass, and the divisor of their loss.

    Every rank makes as many passes as the rank with the most micro-batches. After its own micro-batches a rank makes
    `dummy_passes` over `dummy_sample`, whose gradients are zero. Without a dummy sample no rank has work.
    """

    samples: Sequence[Sample]
    denominator: float
    dummy_passes: int
    dummy_sample: Sequence[Sample]


def split_batch(
    groups: Sequence[Sequence[Sample]],
    ranks: Ranks,
    plan: Plan,
    *,
    advantage_scale: float,
    denominator: float,
    keep_zero_advantage: bool,
) -> RankBatch:
    """Choose this rank's part of the update on `groups`: whole groups, of about as many tokens as on other ranks.

    Each rank plans the micro-batches of all ranks, so that it knows the number of their passes without communication.
    """
    trained = [
        [
            replace(sample, advantage=advantage_scale * sample.advantage)
            for sample in group
            if sample.trained and (sample.advantage != 0 or keep_zero_advantage)
        ]
        for group in groups
    ]
    costs = [sum(map(len, group)) for group in trained]
    by_rank = [[sample for i in part for sample in trained[i]] for part in balance(costs, ranks.size)]
    passes = [len(plan(samples)) for samples in by_rank]
    return RankBatch(
        samples=by_rank[ranks.rank],
        denominator=denominator,
        dummy_passes=max(passes) - passes[ranks.rank],
        dummy_sample=sorted((sample for group in trained for sample in group), key=len)[:1],
    )


def balance(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Partition the indices of `costs` into `parts` of about equal sums, each in order.

    Greedy, longest first, each to the part with the smallest sum: the largest part is at most 4/3 of the optimum
    (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    loads, chosen = [0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        chosen[least].append(i)
    return [sorted(part) for part in chosen]


@dataclass(frozen=True)
class MicroBatch:
    """The sampled tokens of B completions, padded to K; the mask is True where there is a token."""

    mask_BK: Tensor
    behavior_logprobs_BK: Tensor
    advantages_BK: Tensor
    versions_BK: Tensor
    reference_logprobs_BK: Tensor | None
    proximal_logprobs_BK: Tensor | None

    def unflatten(self, values_N: Tensor) -> Tensor:
        """[B, K] from values of all sampled tokens, one completion after another; zero in padding. Differentiable."""
        return values_N.new_zeros(self.mask_BK.shape).masked_scatter(self.mask_BK, values_N)


def collate(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    """Pad the per-token arrays of samples into one micro-batch."""
    lengths_B1 = torch.tensor([[sample.sampled_count] for sample in samples])
    mask_BK = torch.arange(int(lengths_B1.max())) < lengths_B1

    def pad(arrays: Iterable[np.ndarray], dtype: torch.dtype) -> Tensor:
        values_BK = torch.zeros(mask_BK.shape, dtype=dtype)
        values_BK[mask_BK] = torch.from_numpy(np.concatenate(list(arrays))).to(dtype)
        return values_BK.to(device)

    def pad_optional(arrays: Iterable[np.ndarray | None]) -> Tensor | None:
        present = [array for array in arrays if array is not None]  # all or none
        return pad(present, torch.float32) if present else None

    return MicroBatch(
        mask_BK=mask_BK.to(device),
        behavior_logprobs_BK=pad((sample.behavior_logprobs for sample in samples), torch.float32),
        advantages_BK=torch.tensor([[sample.advantage] for sample in samples], device=device).expand(mask_BK.shape),
        versions_BK=pad((sample.versions for sample in samples), torch.long),
        reference_logprobs_BK=pad_optional(sample.reference_logprobs for sample in samples),
        proximal_logprobs_BK=pad_optional(sample.proximal_logprobs for sample in samples),
    )
