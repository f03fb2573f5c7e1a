"""The Task protocol, construction of the task that a config names, and encoding of its problems as prompts."""

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
    """Prompts and scoring. The constructor takes the values under `task.args` in the config.

    Example:
        class Doubling:
            def __init__(self, largest: int = 99) -> None:
                problems = [Problem(f"Double {n}:", answer=str(2 * n)) for n in range(largest + 1)]
                self._splits = {"held_out": problems[::10], "train": [p for i, p in enumerate(problems) if i % 10]}

            def problems(self, split: Split) -> Sequence[Problem]:
                return self._splits[split]

            def score(self, problem: Problem, completion: str) -> float:
                return float(completion.strip() == problem.answer)

        # python scripts/train.py task.target=my_module:Doubling 'task.args={largest: 200}'
    """

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split, the same in every call and in order. The splits have none in common."""
        ...

    def score(self, problem: Problem, completion: str) -> float:
        """Return the finite reward of one answer, by convention in [0, 1]. `completion` has no special tokens."""
        ...


def make_task(config: TaskConfig) -> Task:
    """Make the task that the config names. `task.path` becomes its argument `path`.

    Raises ConfigError for an unknown target or argument, and for a path if the task takes none.
    """
    target = import_target(config.target, key="task.target")
    check_arguments(target, config.args, key="task.args")
    args = dict(config.args)
    if config.path is not None:
        if "path" not in inspect.signature(target).parameters:
            raise ConfigError(f"{config.target} does not read a file; leave it out", key="task.path")
        args["path"] = config.path
    task: Task = target(**args)
    return task


class PromptEncoder:
    """Encode problems as prompt tokens, plain or with the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, max_tokens: int) -> None:
        if config.template == "chat" and tokenizer.chat_template is None:
            raise ConfigError("the model has no chat template; set task.template=plain", key="task.template")
        self._tokenizer, self._config, self._max_tokens = tokenizer, config, max_tokens

    def encode(self, problem: Problem) -> Ints | None:
        """Return token ids [prompt length], or None for a prompt that is empty or longer than `max_tokens`.

        Raises ConfigError if the chat template rejects the messages.
        """
        if self._config.template == "plain":
            token_ids = self._tokenizer.encode(problem.question)
        else:  # the template has written the special tokens already
            token_ids = self._tokenizer.encode(self._chat(problem.question), add_special_tokens=False)
        ids = np.array(token_ids, dtype=np.int64)
        return ids if 0 < len(ids) <= self._max_tokens else None

    def check_usable(self, task: Task) -> None:
        """Raise TaskError if no training problem fits the limit, and ConfigError where `encode` does."""
        problems = task.problems("train")
        if len(problems) == 0:
            raise TaskError(f"task.target: {self._config.target} has no training problems; check task.args")
        if not any(self.encode(problems[i]) is not None for i in range(len(problems))):
            raise TaskError(
                f"rollout.max_prompt_tokens: none of the {len(problems)} prompts of {self._config.target} "
                f"fits into {self._max_tokens} tokens; raise it, or lower rollout.max_completion_tokens if the "
                "model's context length is the limit"
            )

    def _chat(self, question: str) -> str:
        system = self._config.system_prompt
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": question})
        try:
            text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # Gemma's, for example, rejects system messages
            setting = "task.template=plain" if system is None else "task.system_prompt=null"
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the model's chat template rejects the messages ({reason}); set {setting}",
                key=setting.partition("=")[0],
            ) from error
        return text
