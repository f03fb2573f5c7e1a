"""Layouts of a micro-batch: how samples become the rows that the model reads, packed or padded.

`choose_layout` and `find_linear_head` probe the model for what it supports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from grpo.learner.batch import Sample
from grpo.learner.packed_attention import PACKED_ATTENTION, ROWS, attention_rows
from grpo.models.probing import full_attention_blocker, logits_mismatch
from grpo.types import Ints


@dataclass(frozen=True)
class Inputs:
    """Model inputs, and where the model predicts the N sampled tokens of the samples, sample after sample.

    `arguments` are those of the forward pass, with `input_ids` of shape [R, T]. Only the columns `columns_K` of the
    rows predict anything; token n is predicted at `places_N`[n] of the flattened [R, K].
    """

    arguments: Mapping[str, Any]
    columns_K: Tensor
    places_N: Tensor
    targets_N: Tensor


class Layout(Protocol):
    """Arrangement of samples in rows."""

    def plan(self, samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
        """Split samples, by index, into micro-batches of at most `max_tokens` tokens each as the model computes them.

        A sample that costs more makes a micro-batch by itself.
        """

    def lay_out(self, samples: Sequence[Sample], device: torch.device) -> Inputs:
        """Arrange the samples of one micro-batch."""


class PackedLayout:
    """All samples of a micro-batch in one row, without padding; a prompt that several samples share occurs once.

        prompt A | completion A1 | completion A2 | prompt B | completion B1 | ...

    A completion's positions continue from the end of its prompt; only attention (packed_attention.py) has to know that
    it follows the prompt directly. The last token of a completion is left out, since nothing is predicted from it.
    """

    def plan(self, samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
        """Keep the given order, in which the samples of a prompt are adjacent. A micro-batch costs its row's tokens."""
        parts: list[list[int]] = []
        prompts, tokens = set[bytes](), 0
        for i, sample in enumerate(samples):
            own, prompt = len(sample.token_ids) - 1, sample.prompt_ids.tobytes()
            added = own if prompt in prompts else own + len(sample.prompt_ids)
            if not parts or tokens + added > max_tokens:
                parts.append([])
                prompts, tokens, added = set(), 0, own + len(sample.prompt_ids)
            parts[-1].append(i)
            prompts.add(prompt)
            tokens += added
        return parts

    def lay_out(self, samples: Sequence[Sample], device: torch.device) -> Inputs:
        # Place prompts and completions one after another; `sequences` are the places of each prompt + completion.
        tokens: list[Ints] = []
        prompt_starts: dict[bytes, int] = {}
        size, sequences = 0, []
        for sample in samples:
            prompt, own = sample.prompt_ids, sample.token_ids[:-1]
            if (key := prompt.tobytes()) not in prompt_starts:
                prompt_starts[key], size = size, size + len(prompt)
                tokens.append(prompt)
            start = prompt_starts[key]
            sequences.append(np.r_[start : start + len(prompt), size : size + len(own)])
            tokens.append(own)
            size += len(own)
        positions = np.empty(size, np.int64)
        for sequence in sequences:
            positions[sequence] = np.arange(len(sequence))

        # A token is predicted at the one before it; the first one of the completion at the last one of the prompt.
        predicting = [
            sequence[len(sample.prompt_ids) - 1 + sample.places]
            for sample, sequence in zip(samples, sequences, strict=True)
        ]

        def on_device(arrays: Sequence[Ints]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(arrays)).to(device)

        columns_N = on_device(predicting)
        return Inputs(
            arguments={
                "input_ids": on_device(tokens)[None],
                "position_ids": on_device([positions])[None],
                "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # stops transformers' own
                ROWS: attention_rows(sequences, device),
            },
            columns_K=columns_N,
            places_N=torch.arange(len(columns_N), device=device),
            targets_N=on_device([sample.token_ids[sample.places] for sample in samples]),
        )


class PaddedLayout:
    """A row for every sample, padded on the right, as any causal LM supports it."""

    def plan(self, samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
        """Put similar lengths together. A micro-batch costs its padded tokens."""
        parts: list[list[int]] = []
        for i in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
            if parts and len(samples[parts[-1][0]]) * (len(parts[-1]) + 1) <= max_tokens:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def lay_out(self, samples: Sequence[Sample], device: torch.device) -> Inputs:
        # Masks come from lengths, never from token ids: the pad token may be the eos token that is trained on.
        rows = [torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids])) for sample in samples]
        tokens_BT = pad_sequence(rows, batch_first=True)
        lengths_B1 = torch.tensor([[len(sample)] for sample in samples])
        positions_T = torch.arange(tokens_BT.shape[1])
        columns_K = positions_T[min(len(sample.prompt_ids) for sample in samples) - 1 : -1]
        predicts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
        for predicts_T, sample in zip(predicts_BT, samples, strict=True):
            predicts_T[len(sample.prompt_ids) - 1 + sample.places] = True
        predicts_BK = predicts_BT[:, columns_K]
        return Inputs(
            arguments={
                "input_ids": tokens_BT.to(device),
                "attention_mask": (positions_T < lengths_B1).long().to(device),
            },
            columns_K=columns_K.to(device),
            places_N=predicts_BK.flatten().nonzero()[:, 0].to(device),
            targets_N=tokens_BT[:, columns_K + 1][predicts_BK].to(device),
        )


def choose_layout(model: PreTrainedModel, packing: str) -> tuple[Layout, str | None]:
    """Return the layout, and the reason when it is padded though packing was allowed.

    May change the model's attention function.
    """
    if packing == "never":
        return PaddedLayout(), None
    if reason := full_attention_blocker(model, ("sdpa", PACKED_ATTENTION)):
        return PaddedLayout(), reason
    original = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    if (reason := _packing_mismatch(model)) is None:
        return PackedLayout(), None
    model.set_attn_implementation(original)
    return PaddedLayout(), reason


def _packing_mismatch(model: PreTrainedModel) -> str | None:
    """Return how packed logits differ from padded ones, or None; tried on two prompts with two completions each."""
    rng, vocab = np.random.default_rng(0), model.config.get_text_config().vocab_size
    prompts = [rng.integers(vocab, size=length) for length in (5, 3)]
    samples = [
        Sample(prompt_ids=prompt, token_ids=tokens, behavior_logprobs=np.zeros(4, np.float32), versions=tokens)
        for prompt in prompts
        for tokens in rng.integers(vocab, size=(2, 4))
    ]
    try:
        packed_NV, padded_NV = (_logits(model, layout, samples) for layout in (PackedLayout(), PaddedLayout()))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"a packed row fails: {type(error).__name__}: {error}".partition("\n")[0]
    reason = logits_mismatch(packed_NV, padded_NV)
    return reason and f"logits of packed rows are {reason}"


@torch.no_grad()
def _logits(model: PreTrainedModel, layout: Layout, samples: list[Sample]) -> Tensor:
    inputs = layout.lay_out(samples, model.device)
    logits = model(**inputs.arguments, use_cache=False, logits_to_keep=inputs.columns_K).logits
    return logits.flatten(0, 1)[inputs.places_N]


def find_linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the LM head if it is linear and alone between the last hidden states and the logits, else None."""
    head, head_inputs = model.get_output_embeddings(), list[Tensor]()
    if not isinstance(head, nn.Linear):
        return None
    planted_V = torch.linspace(-100, 100, head.out_features)  # capping or scaling of logits would change these

    def plant(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        head_inputs.append(args[0])
        return planted_V.to(output).expand_as(output)

    tokens_1T = torch.arange(4, device=model.device)[None] % head.out_features
    hook = head.register_forward_hook(plant)
    try:
        with torch.no_grad():
            logits_1TV = model(input_ids=tokens_1T, use_cache=False).logits
            hidden_1TD = model.base_model(input_ids=tokens_1T, use_cache=False)[0]
    finally:
        hook.remove()

    # Exact, if the planted logits come out unchanged and the head's input was the base model's output.
    same_logits = torch.equal(logits_1TV[0, 0], planted_V.to(logits_1TV))
    same_hidden = head_inputs[0].shape == hidden_1TD.shape and torch.allclose(head_inputs[0], hidden_1TD)
    return head if same_logits and same_hidden else None
