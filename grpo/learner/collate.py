"""From groups to padded micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo.types import Completion, Floats, Group, Ints


@dataclass(frozen=True)
class Sample:
    """One completion behind its prompt. The per-token arrays have shape [T], T tokens of the completion."""

    token_ids: Ints  # [prompt length + T]
    behavior_logprobs: Floats
    versions: Ints
    advantage: float
    reference_logprobs: Floats | None = None
    proximal_logprobs: Floats | None = None
    trained: bool = True

    @property
    def prompt_length(self) -> int:
        return len(self.token_ids) - len(self.behavior_logprobs)

    @property
    def trained_length(self) -> int:
        """How many tokens are trained on."""
        return len(self.behavior_logprobs) if self.trained else 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class MicroBatch:
    """B samples padded on the right to T tokens. Position t of the [B, K] tensors predicts token `first` + t + 1.

    K = T - 1 - `first` leaves out the columns in which every sample is still within its prompt.
    """

    tokens_BT: Tensor
    attention_BT: Tensor
    first: int
    mask_BK: Tensor
    behavior_logprobs_BK: Tensor
    advantages_BK: Tensor
    versions_BK: Tensor
    reference_logprobs_BK: Tensor | None
    proximal_logprobs_BK: Tensor | None


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
        token_ids=np.concatenate([prompt_ids, completion.token_ids]),
        behavior_logprobs=completion.logprobs,
        versions=np.repeat(versions, counts),
        advantage=advantage,
        reference_logprobs=reference_logprobs,
        trained=trained,
    )


def plan(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split samples into micro-batches of like lengths, by index, each of at most `max_tokens` padded tokens.

    A sample longer than that makes a micro-batch of its own.
    """
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if part and lengths[part[0]] * (len(part) + 1) > max_tokens:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def collate(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    """Pad. Masks come from lengths, never from token ids: the pad token may be the eos token that is trained on."""
    tokens_BT = pad_sequence([torch.tensor(sample.token_ids) for sample in samples], batch_first=True)
    lengths_B = torch.tensor([len(sample) for sample in samples])
    prompt_lengths_B = torch.tensor([sample.prompt_length for sample in samples])
    positions_T = torch.arange(tokens_BT.shape[1])
    first = int(prompt_lengths_B.min()) - 1
    predicted_K = positions_T[first + 1 :]
    mask_BK = (predicted_K >= prompt_lengths_B[:, None]) & (predicted_K < lengths_B[:, None])

    def spread(arrays: Iterable[np.ndarray], dtype: torch.dtype) -> Tensor:
        """Per-token values into the places where the mask is set, zero elsewhere."""
        values_BK = torch.zeros(mask_BK.shape, dtype=dtype)
        values_BK[mask_BK] = torch.from_numpy(np.concatenate(list(arrays))).to(dtype)
        return values_BK.to(device)

    def spread_if_there(arrays: Iterable[np.ndarray | None]) -> Tensor | None:
        there = [array for array in arrays if array is not None]
        return spread(there, torch.float32) if there else None

    return MicroBatch(
        tokens_BT=tokens_BT.to(device),
        attention_BT=(positions_T < lengths_B[:, None]).long().to(device),
        first=first,
        mask_BK=mask_BK.to(device),
        behavior_logprobs_BK=spread((sample.behavior_logprobs for sample in samples), torch.float32),
        advantages_BK=torch.tensor([[sample.advantage] for sample in samples], device=device).expand(mask_BK.shape),
        versions_BK=spread((sample.versions for sample in samples), torch.long),
        reference_logprobs_BK=spread_if_there(sample.reference_logprobs for sample in samples),
        proximal_logprobs_BK=spread_if_there(sample.proximal_logprobs for sample in samples),
    )
