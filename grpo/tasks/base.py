"""What a task is, and making the one that a config names."""

# MERGED: From problems to prompt tokens: the one place that knows templates and the length limit.

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jinja2 import TemplateError

from grpo.config.algorithm import TaskConfig
from grpo.errors import ConfigError, TaskError
from grpo.types import Ints, Problem
from grpo.utils.imports import check_arguments, import_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "held_out"]


class Task(Protocol):
    """Prompts and scoring. The constructor takes what stands under `task.args` in the config."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, the same ones in the same order at every call; the splits share none."""
        ...

    def score(self, problem: Problem, completion: str) -> float:
        """The reward of one answer, finite; by convention in [0, 1]. Special tokens are already removed."""
        ...


def make_task(config: TaskConfig) -> Task:
    """The task that the config names; `path` goes to one that reads a file.

    Raises ConfigError for an unknown target or argument, and for a path to a task that takes none.
    """
    target = import_target(config.target, key="task.target")
    check_arguments(target, config.args, key="task.args")
    args = dict(config.args)
    if config.path is not None:
        if "path" not in inspect.signature(target).parameters:
            raise ConfigError(f"{config.target} reads no file; leave it out", key="task.path")
        args["path"] = config.path
    task: Task = target(**args)
    return task


class PromptEncoder:
    """Encodes problems with a tokenizer, plain or through its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, max_tokens: int) -> None:
        if config.template == "chat" and tokenizer.chat_template is None:
            raise ConfigError("the model has no chat template; set task.template=plain", key="task.template")
        self._tokenizer, self._config, self._max_tokens = tokenizer, config, max_tokens

    def encode(self, problem: Problem) -> Ints | None:
        """Token ids [prompt length], or None when there are none or more than the limit.

        Raises ConfigError when the chat template refuses the messages.
        """
        ids = np.array(self._token_ids(problem.question), dtype=np.int64)
        return ids if 0 < len(ids) <= self._max_tokens else None

    def check_usable(self, task: Task) -> None:
        """Raise TaskError unless at least one training problem fits, ConfigError where `encode` does."""
        problems = task.problems("train")
        if len(problems) == 0:
            raise TaskError(f"task.target: {self._config.target} has no training problems; check task.args")
        if not any(self.encode(problems[i]) is not None for i in range(len(problems))):
            raise TaskError(
                f"rollout.max_prompt_tokens: none of the {len(problems)} prompts of {self._config.target} "
                f"fits into {self._max_tokens} tokens; raise it, or lower rollout.max_completion_tokens where the "
                "model's context is the limit"
            )

    def _token_ids(self, question: str) -> list[int]:
        if self._config.template == "plain":
            return list(self._tokenizer.encode(question))
        return list(self._tokenizer.encode(self._chat(question), add_special_tokens=False))

    def _chat(self, question: str) -> str:
        system = self._config.system_prompt
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": question})
        try:
            text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # that of Gemma, for one, refuses system messages
            setting = "task.template=plain" if system is None else "task.system_prompt=null"
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the model's chat template can't be filled in ({reason}); set {setting}", key=setting.partition("=")[0]
            ) from error
        return text
