"""A Llama of about a million parameters with a character tokenizer, built on the spot and cached.

A short supervised warm start teaches it the format of a task from the task's own demonstrations. The result is an
ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, PreTrainedTokenizerFast

from grpo.errors import ConfigError
from grpo.models.loading import cached
from grpo.tasks.base import Task
from grpo.types import Problem

_CHARACTERS = string.ascii_letters + string.digits + " +-*/=<>?:.,()#"
_SPECIAL = ("<pad>", "<eos>", "<unk>")


class DemonstratedTask(Task, Protocol):
    """A task that can write example answers."""

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> str | Sequence[str]:
        """Return an answer in the right format; it need not be correct.

        For an episode, return its turns and the replies between them: an odd number of texts.
        """


def prepare(task: DemonstratedTask, *, steps: int = 300, batch_size: int = 64, lr: float = 2e-3) -> Path:
    """Return the folder of the warm-started model; the first call makes it, later calls find it in the cache.

    The cache key covers the task's prompts and demonstrations, the settings and this file. The same inputs give the
    same weights on the same machine. Raises ConfigError for a task without demonstrations.
    """
    if not hasattr(task, "demonstration"):
        raise ConfigError(
            f"{type(task).__name__} has no demonstrations to learn from; use model=hf", key="model.builder"
        )
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr}
    rng = np.random.default_rng(0)
    lessons = [(problem.question, task.demonstration(problem, rng)) for problem in task.problems("train")]
    source = Path(__file__).read_text(encoding="utf-8")
    key = hashlib.sha256(json.dumps([settings, lessons, source]).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        tokenizer, model = character_tokenizer(), tiny_llama()
        with _one_thread():
            _warm_start(model, tokenizer, task, steps=steps, batch_size=batch_size, lr=lr)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached(f"tiny-{type(task).__name__.lower()}-{key}", make)


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_llama(*, width: int = 128, layers: int = 4, heads: int = 4, seed: int = 0) -> transformers.LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(_CHARACTERS),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one torch thread: small matrices gain little from more, and lose much when other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _warm_start(
    model: transformers.LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: DemonstratedTask,
    *,
    steps: int,
    batch_size: int,
    lr: float,
) -> None:
    rng = np.random.default_rng(0)
    problems = task.problems("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    with Progress() as progress:
        for _ in progress.track(range(steps), description="warm start: teaching a tiny model the format"):
            chosen = [problems[i] for i in rng.integers(len(problems), size=batch_size)]
            tokens_BT, labels_BT = _examples(chosen, tokenizer, task, rng)
            logits_BTV = model(tokens_BT, attention_mask=(tokens_BT != 0).long()).logits
            loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _examples(
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    task: DemonstratedTask,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B, T] padded on the right, and labels [B, T] that are -100 on prompts and padding."""
    rows = []
    for problem in problems:
        shown = task.demonstration(problem, rng)
        tokens = tokenizer.encode(problem.question)
        labels = [-100] * len(tokens)
        for i, text in enumerate([shown] if isinstance(shown, str) else shown):
            said = i % 2 == 0  # else it is a reply, which the model does not have to learn
            part = [*tokenizer.encode(text), *([tokenizer.eos_token_id] if said else [])]
            tokens += part
            labels += part if said else [-100] * len(part)
        rows.append((torch.tensor(tokens), torch.tensor(labels)))
    tokens_BT = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    labels_BT = torch.nn.utils.rnn.pad_sequence([labels for _, labels in rows], True, padding_value=-100)
    return tokens_BT, labels_BT
