"""The learner: packed rows against padded ones, and log-probabilities in blocks against whole logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.figures import Figure
from grpo.config.actors import ModelConfig
from grpo.learner.batch import Sample
from grpo.learner.layouts import PaddedLayout
from grpo.learner.lm_head import linear_logprobs
from grpo.learner.logprobs import TokenLogprobs, logits_logprobs
from grpo.models.loading import load_model
from grpo.models.smollm2 import prepare
from grpo.models.tiny import tiny_llama

GROUPS, GROUP = 16, 8
PROMPT_TOKENS = 32
MEAN_TOKENS, MOST_TOKENS = 32, 256
WIDTH, VOCABULARIES = 576, (32_000, 152_000)
_SCRIPTS = Path(__file__).parents[1]

Pass = Callable[[], None]
"""A forward and backward pass."""


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(os.cpu_count() or 1)
    figures = []
    for budget in (16384, 4096):
        figures += _packing("tiny", budget, rounds=2 if quick else 10)
    if not quick:
        figures += _packing("SmolLM2", 2048, rounds=1)
    for words, tokens in zip(VOCABULARIES, (1024, 512) if quick else (1024, 1024), strict=True):
        figures += _head(words, tokens, rounds=2 if quick else 6)
    return figures


# --- packed against padded ---


def _packing(name: str, budget: int, rounds: int, groups: int = GROUPS) -> list[Figure]:
    """Train on the same completions packed, padded in order of length, and padded in order of arrival."""
    models, samples = {way: _model(name) for way in ("packed", "padded", "arrival")}, _samples(groups)
    ways = {way: TokenLogprobs(model, 1.0, "auto" if way == "packed" else "never") for way, model in models.items()}
    ways["arrival"]._layout = _ArrivalLayout()
    passes = {way: partial(_train, logprobs, samples, budget) for way, logprobs in ways.items()}
    gap = _gap(*(_gradients(models[way], passes[way]) for way in ("packed", "padded")))
    packed_s, padded_s, arrival_s = _fastest(list(passes.values()), rounds)
    tokens, what = sum(len(sample.token_ids) for sample in samples), f"{name}, ragged, {budget} at a time"
    return [
        Figure("learner", f"{what}: packed", tokens / packed_s, "tokens/s"),
        Figure("learner", f"{what}: over padded, sorted by length", padded_s / packed_s, at_least=1.6),
        Figure("learner", f"{what}: over padded, in order of arrival", arrival_s / packed_s),
        Figure("learner", f"{what}: gradients apart, of their norm", gap, at_most=1e-5),
    ]


def _model(name: str) -> PreTrainedModel:
    if name == "tiny":
        return tiny_llama().train()
    return load_model(ModelConfig(path=str(prepare(None))), torch.float32, "cpu").train()  # type: ignore[arg-type]


def _samples(groups: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / MEAN_TOKENS, size=(groups, GROUP)), MOST_TOKENS)
    samples = []
    for row in lengths:
        prompt = rng.integers(3, 70, PROMPT_TOKENS)
        for length in row:
            zeros = np.zeros(length)
            samples.append(Sample(prompt, rng.integers(3, 70, length), zeros.astype(np.float32), zeros.astype(int)))
    return samples


class _ArrivalLayout(PaddedLayout):
    """Padded rows without sorting by length."""

    def plan(self, samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for i in range(len(samples)):
            longer = [*parts[-1], i] if parts else []
            if longer and len(longer) * max(len(samples[k]) for k in longer) <= max_tokens:
                parts[-1] = longer
            else:
                parts.append([i])
        return parts


def _train(logprobs: TokenLogprobs, samples: Sequence[Sample], budget: int) -> None:
    total = sum(len(sample.token_ids) for sample in samples)
    for part in logprobs.plan(samples, budget):
        logprobs_N, _ = logprobs([samples[i] for i in part])
        (logprobs_N.sum() / total).backward()


def _gradients(model: PreTrainedModel, train: Pass) -> list[Tensor]:
    train()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest over all parameters, relative to the norm of its gradient."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def _fastest(passes: Sequence[Pass], rounds: int) -> list[float]:
    """Seconds. Rounds alternate, so that a slow moment of the machine meets all; the first of each warms up."""
    seconds = [[_timed(run_pass) for run_pass in passes] for _ in range(rounds + 1)][1:]
    return [min(column) for column in zip(*seconds, strict=True)]


def _timed(work: Pass) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- vocabulary blocks against whole logits ---


def _head(words: int, tokens: int, rounds: int) -> list[Figure]:
    blocks_s, whole_s = _fastest([_head_pass(way, words, tokens) for way in ("blocks", "whole")], rounds)
    blocks, whole = _extra_bytes(words, tokens)
    what = f"head, {words:,} words, {tokens} tokens"
    return [
        Figure("learner", f"{what}: memory of whole logits", whole / 2**20, "MiB"),
        Figure("learner", f"{what}: memory in blocks over that", blocks / whole, at_most=0.25),
        Figure("learner", f"{what}: speed in blocks over that of whole logits", whole_s / blocks_s, at_least=0.9),
    ]


def _head_pass(way: str, words: int, tokens: int) -> Pass:
    """Log-probabilities, entropy, a loss and all gradients of a head."""
    torch.manual_seed(0)
    head, hidden_ND = nn.Linear(WIDTH, words, bias=False), torch.randn(tokens, WIDTH, requires_grad=True)
    targets_N = torch.randint(words, (tokens,))

    def logprobs() -> tuple[Tensor, Tensor]:
        if way == "blocks":
            return linear_logprobs(hidden_ND, head, targets_N, 0.7)
        return logits_logprobs(head(hidden_ND).float() / 0.7, targets_N)

    def run_pass() -> None:
        head.weight.grad = hidden_ND.grad = None
        logprobs_N, _ = logprobs()
        (logprobs_N - logprobs_N.detach()).exp().mean().neg().backward()

    return run_pass


def _extra_bytes(words: int, tokens: int) -> tuple[int, int]:
    """Of a pass in blocks and of one with whole logits, measured in a fresh process."""
    code = f"from benchmarks import learner; learner.report_extra_bytes({words}, {tokens})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_SCRIPTS), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    blocks, whole = json.loads(result.stdout)
    return blocks, whole


def report_extra_bytes(words: int, tokens: int) -> None:
    """Print the most resident memory of each pass above what was there before it, the larger pass last.

    A small pass goes first, for what libraries allocate once.
    """
    found = []
    for way in ("blocks", "whole"):
        _head_pass(way, 1000, 64)()
        run_pass = _head_pass(way, words, tokens)
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        run_pass()
        found.append(_status_bytes("VmHWM") - before)
        del run_pass
    print(json.dumps(found))


def _status_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
