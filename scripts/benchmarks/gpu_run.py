"""A whole run on one GPU, which trainer and torch engine share: `scripts/train.py` on a model of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.figures import Figure

MEAN_TOKENS, MOST_TOKENS = 256, 1024
_SCRIPTS = Path(__file__).parents[1]


def run(name: str, model: PreTrainedModel, steps: int) -> list[Figure]:
    """Figures of the last half of the steps; before, kernels are compiled and graphs recorded."""
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder, "model"))
        settings = {
            "model.path": f"{folder}/model",
            "task.template": "plain",
            "++reward.functions": "{benchmarks.gpu_reward.brevity:1.0}",
            "rollout.max_prompt_tokens": 64,
            "rollout.max_completion_tokens": MOST_TOKENS,
            "generator.engine": "torch",
            "trainer.max_steps": steps,
            "checkpoint.every": 0,
            "eval.prompts": 0,
            "hydra.run.dir": f"{folder}/run",
        }
        command = [sys.executable, str(_SCRIPTS / "train.py"), "+experiment=gsm8k_1gpu", "task=arithmetic"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_SCRIPTS), *sys.path])}
        with _gpu_use() as busy:
            result = subprocess.run(
                [*command, *(f"{key}={value}" for key, value in settings.items())],
                env=environment,
                capture_output=True,
                text=True,
            )
        if result.returncode:
            raise RuntimeError(f"the run failed: {result.stdout[-2000:]}{result.stderr[-2000:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return _figures(name, lines[steps // 2 :], lines[steps // 2 - 1]["wall_s"], busy)


def _figures(name: str, lines: list[dict[str, Any]], began_s: float, busy: list[tuple[float, float]]) -> list[Figure]:
    took_s = lines[-1]["wall_s"] - began_s
    tokens = sum(line["trainer/tokens"] for line in lines)
    last = [percent for at, percent in busy if at > busy[-1][0] - took_s] or [0.0]
    what = f"{name}, a run on one GPU"
    return [
        Figure("gpu", f"{what}: completion tokens trained on", tokens / took_s, "tokens/s"),
        Figure("gpu", f"{what}: train step", mean(line["time/train_step_s"] for line in lines), "s"),
        Figure("gpu", f"{what}: held up by new weights", mean(line["time/weight_sync_s"] for line in lines), "s"),
        Figure("gpu", f"{what}: until they are live", mean(line["time/weight_load_s"] for line in lines), "s"),
        Figure("gpu", f"{what}: trainer waits", sum(line["time/trainer_wait_s"] for line in lines) / took_s),
        Figure("gpu", f"{what}: generator busy", mean(line["generator/busy_fraction"] for line in lines)),
        Figure("gpu", f"{what}: GPU busy", mean(last) / 100),
    ]


def _save(model: PreTrainedModel, folder: Path) -> None:
    """One token in `MEAN_TOKENS` ends an answer. Questions are read byte by byte; other tokens are words."""
    words = model.config.vocab_size
    model.generation_config.eos_token_id = list(range(words // MEAN_TOKENS))
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"w{i}" for i in range(words - len(letters)))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)


@contextmanager
def _gpu_use() -> Iterator[list[tuple[float, float]]]:
    """Seconds and the percentage of the time in which a kernel ran, up to now five times a second; see nvidia-smi."""
    samples: list[tuple[float, float]] = []
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield samples
    finally:
        process.terminate()
        output, _ = process.communicate()
        samples.extend((0.2 * i, float(line)) for i, line in enumerate(output.split()) if line.isdigit())
