"""One round of the engine benchmark for each of the programs compared; all generate the same groups."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.types import SamplingParams
from grpo.utils.torch_utils import run_in_temp_thread

GROUP = 8
PROMPT_TOKENS = 32
EVEN_TOKENS = 32
MEAN_TOKENS, MOST_TOKENS = 32, 256
BATCHES = 3  # per round, each of as many sequences as run at once
THREADS = os.cpu_count() or 1
_PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """Model and workload: all prompts wait from the start, `sequences` run at once, ragged ones end at random."""

    model: str
    sequences: int
    ragged: bool

    @property
    def most_tokens(self) -> int:
        return MOST_TOKENS if self.ragged else EVEN_TOKENS

    @property
    def seeds(self) -> range:
        """One seed per group."""
        return range(BATCHES * self.sequences // GROUP)

    def stop_token_ids(self, vocabulary: int) -> list[int]:
        """Return so many of the equally likely tokens that a completion ends after `MEAN_TOKENS` on average."""
        return list(range(vocabulary // MEAN_TOKENS)) if self.ragged else []

    def __str__(self) -> str:
        return f"{self.model}, {'ragged' if self.ragged else 'even'}, {self.sequences} sequences"


def torch_tokens_per_s(model: PreTrainedModel, case: Case) -> float:
    return asyncio.run(_torch_tokens_per_s(model, case))


async def _torch_tokens_per_s(model: PreTrainedModel, case: Case) -> float:
    limits = Limits(PROMPT_TOKENS, case.most_tokens, case.sequences)
    stops = case.stop_token_ids(model.config.vocab_size)
    engine = TorchEngine(model, stop_token_ids=stops, limits=limits, threads=THREADS)
    params = [SamplingParams(n=GROUP, max_tokens=case.most_tokens, seed=seed) for seed in case.seeds]
    try:
        began = time.perf_counter()
        groups = await asyncio.gather(*(engine.generate(_prompt(each.seed), each) for each in params))
        return sum(len(made.token_ids) for group in groups for made in group) / (time.perf_counter() - began)
    finally:
        await engine.close()


def generate_tokens_per_s(model: PreTrainedModel, case: Case) -> float:
    """Measure `model.generate` on one batch after the other, each of as many sequences as the engine runs at once."""
    # Its threads have to end with the round: two OpenMP pools slow each other down, even when one is idle.
    return asyncio.run(run_in_temp_thread(THREADS, _generate_tokens_per_s, model, case))


def _generate_tokens_per_s(model: PreTrainedModel, case: Case) -> float:
    stops = case.stop_token_ids(model.config.vocab_size)
    tokens, began = 0, time.perf_counter()
    for batch in np.split(np.array(case.seeds), BATCHES):
        prompts = torch.tensor(np.stack([_prompt(seed) for seed in batch])).repeat_interleave(GROUP, dim=0)
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=case.most_tokens,
                eos_token_id=stops or None,
                pad_token_id=0,
            )
        ended = torch.isin(made[:, PROMPT_TOKENS:], torch.tensor(stops)).int()
        tokens += int(((ended.cumsum(dim=1) - ended) == 0).sum())  # up to and including the stop token
    return tokens / (time.perf_counter() - began)


def vllm_python() -> Path | None:
    """Return the interpreter of the environment that has vLLM, or None."""
    python = Path(os.environ.get("VLLM_VENV", _PROJECT / ".venv-vllm")) / "bin/python"
    return python if python.exists() else None


class VLLMProcess:
    """vLLM in a separate process and environment (vllm_rounds.py). It is idle between rounds."""

    def __init__(self, python: Path, folder: str, dtype: str, sequences: int) -> None:
        program = Path(__file__).with_name("vllm_rounds.py")
        settings = {
            "model": folder,
            "dtype": dtype,
            "max_num_seqs": sequences,
            "max_model_len": PROMPT_TOKENS + MOST_TOKENS,
        }
        self._command = [str(python), str(program), json.dumps(settings), str(THREADS)]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._vocabulary = self._ask({"prompts": [], "params": {}})["vocabulary"]

    def tokens_per_s(self, case: Case) -> float:
        params = {"n": GROUP, "max_tokens": case.most_tokens, "stop_token_ids": case.stop_token_ids(self._vocabulary)}
        answer = self._ask({"prompts": [_prompt(seed).tolist() for seed in case.seeds], "params": params})
        return float(answer["tokens"] / answer["seconds"])

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"vLLM's process ended. To see why, run {shlex.join(self._command)}")
        return dict(json.loads(line))


def _prompt(seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(3, 70, PROMPT_TOKENS)
