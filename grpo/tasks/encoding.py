"""From problems to prompt tokens: the one place that knows templates and the length limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from grpo.config import TaskConfig
from grpo.tasks.base import Task
from grpo.types import ConfigError, Ints, Problem, TaskError

if TYPE_CHECKING:  # takes a second to import
    from transformers import PreTrainedTokenizerBase


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
