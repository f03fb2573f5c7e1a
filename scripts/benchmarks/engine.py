"""Tokens per second of the torch engine against `model.generate` and vLLM, with even and with ragged lengths."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.engine_rounds import Case, VLLMProcess, generate_tokens_per_s, torch_tokens_per_s, vllm_python
from benchmarks.figures import Figure
from grpo.config.actors import ModelConfig
from grpo.models.loading import load_model
from grpo.models.smollm2 import prepare
from grpo.models.tiny import tiny_llama
from grpo.utils.torch_utils import run_in_temp_thread

DTYPES = {"tiny": "float32", "SmolLM2": "bfloat16"}
ROUNDS = {"tiny": 4, "SmolLM2": 1}  # the first of several is a warm-up; a round of SmolLM2 takes minutes and needs none
# Targets at 64 sequences, by opponent and raggedness.
AT_LEAST = {("model.generate", False): 1.0, ("model.generate", True): 1.8, ("vLLM", False): 1.0, ("vLLM", True): 1.0}


def run(quick: bool) -> list[Figure]:
    figures = []
    if vllm_python() is None:
        print("skipped vLLM: not installed. `make vllm` installs it into a separate environment")
    for name in ("tiny",) if quick else ("tiny", "SmolLM2"):
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(run_in_temp_thread(1, _save, name, folder))
            model = asyncio.run(run_in_temp_thread(1, _load, folder, DTYPES[name]))
            for sequences in (64,) if quick else (8, 32, 64, 128):
                with _vllm(folder, DTYPES[name], sequences) as vllm:
                    for ragged in (False, True):
                        figures += _compare(model, vllm, Case(name, sequences, ragged), 3 if quick else ROUNDS[name])
    return figures


def _compare(model: PreTrainedModel, vllm: VLLMProcess | None, case: Case, rounds: int) -> list[Figure]:
    """Measure in alternating rounds, so that a slow moment of the machine affects all programs."""
    sides = {"torch engine": lambda: torch_tokens_per_s(model, case)}
    sides["model.generate"] = lambda: generate_tokens_per_s(model, case)
    if vllm is not None:
        sides["vLLM"] = lambda: vllm.tokens_per_s(case)
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, measure in sides.items():
            speeds[side].append(measure())
    ours, *others = ((side, max(measured[1:] or measured)) for side, measured in speeds.items())
    figures = [Figure("engine", f"{case}: torch engine", ours[1], "tokens/s")]
    for side, speed in others:
        target = AT_LEAST[side, case.ragged] if (case.model, case.sequences) == ("tiny", 64) else None
        figures.append(Figure("engine", f"{case}: over {side}", ours[1] / speed, at_least=target))
    return figures


def _save(name: str, folder: str) -> None:
    """Save a model whose head is zero: all tokens are equally likely, so the number of stop tokens sets the length."""
    if name == "tiny":
        config = tiny_llama().config
        config.vocab_size = 96
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        model = load_model(ModelConfig(path=str(prepare(None))), torch.bfloat16, "cpu")  # type: ignore[arg-type]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.save_pretrained(folder)


def _load(folder: str, dtype: str) -> PreTrainedModel:
    return load_model(ModelConfig(path=folder), getattr(torch, dtype), "cpu")


@contextmanager
def _vllm(folder: str, dtype: str, sequences: int) -> Iterator[VLLMProcess | None]:
    python = vllm_python()
    if python is None:
        yield None
        return
    process = VLLMProcess(python, folder, dtype, sequences)
    try:
        yield process
    finally:
        process.close()
