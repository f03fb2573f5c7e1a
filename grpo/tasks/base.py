"""The Task protocol; the task, environments and prompts that a config names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from grpo.config.algorithm import TaskConfig
from grpo.environments.base import Environment, Message
from grpo.environments.calls import UserCalls
from grpo.environments.model_renderer import ModelRenderer
from grpo.environments.renderers import ChatRenderer, PlainRenderer, Renderer
from grpo.environments.tools import MethodsEnvironment, ToolEnvironment, Tools
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

        # in my_module.py; ~task.args drops the arguments of the default task:
        # PYTHONPATH=. grpo train model=smollm2 '~task.args' task.target=my_module:Doubling '+task.args={largest: 200}'
    """

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split, the same in every call and in order. The splits have none in common."""
        ...

    def score(self, problem: Problem, completion: str) -> float:
        """Return the finite reward of one answer, by convention in [0, 1]. `completion` has no special tokens.

        A task whose answers take several turns has a method `environment(problem, seed)` instead, which makes the
        Environment of one episode: see grpo/environments/base.py.
        """
        ...


def make_task(config: TaskConfig) -> Task:
    """Make the task that the config names. `task.path` becomes its argument `path`.

    Raises ConfigError for an unknown target or argument, and for a path if the task takes none.
    """
    target = import_target(config.target, key="task.target")
    check_arguments(target, config.args, key="task.args", fix="'~task.args' drops those of the default task")
    args = dict(config.args)
    if config.path is not None:
        if "path" not in inspect.signature(target).parameters:
            raise ConfigError(f"{config.target} does not read a file; leave it out", key="task.path")
        args["path"] = config.path
    task: Task = target(**args)
    return task


def environment_maker(
    task: Task, config: TaskConfig, tools: Sequence[str], calls: UserCalls
) -> Callable[[Problem, int], Environment]:
    """Return the function that makes the environment of an episode, from a problem and a seed.

    It is the task's own method `environment`, which may also return an object whose methods are tools (see
    ObjectWithTools); or the task's question with the functions `tools`, scored by the task. Raises ConfigError when a
    task has its own environment and is given tools, and for functions that can't be imported or described.
    """
    make = getattr(task, "environment", None)
    if tools and make is not None:
        raise ConfigError(f"{config.target} has an environment of its own; leave them out", key="environment.tools")
    if make is None:
        key = "environment.tools"
        known = Tools([import_target(name, key=key) for name in tools], calls, key=key)
        return lambda problem, seed: ToolEnvironment(
            opening_messages(problem, config), known, partial(task.score, problem)
        )

    def own(problem: Problem, seed: int) -> Environment:
        made = make(problem, seed)
        if hasattr(made, "begin"):
            return made
        if hasattr(made, "reset") and hasattr(made, "reward"):
            return MethodsEnvironment(made, problem, calls)
        raise ConfigError(
            f"its environment is of type {type(made).__name__}, which has neither begin nor reset and reward",
            key="task.target",
        )

    return own


def opening_messages(problem: Problem, config: TaskConfig) -> list[Message]:
    """Return the question as a conversation, after the system prompt, if there is one."""
    system = [Message("system", config.system_prompt)] if config.system_prompt is not None else []
    return [*system, Message("user", problem.question)]


def make_renderer(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, stop_token_ids: Sequence[int]) -> Renderer:
    """Make the renderer that `task.template` and `task.renderer` name.

    Raises ConfigError if the tokenizer has no chat template, or a renderer that does not fit it.
    """
    if config.template == "plain":
        return PlainRenderer(tokenizer, stop_token_ids)
    if config.renderer is None:
        return ChatRenderer(tokenizer, stop_token_ids)
    return ModelRenderer(tokenizer, stop_token_ids, config.renderer)


class PromptEncoder:
    """Encode problems as prompt tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, max_tokens: int) -> None:
        self._renderer = make_renderer(tokenizer, config, stop_token_ids=())
        self._config, self._max_tokens = config, max_tokens

    def encode(self, problem: Problem) -> Ints | None:
        """Return token ids [prompt length], or None for a prompt that is empty or longer than `max_tokens`.

        Raises ConfigError if the chat template rejects the messages.
        """
        ids = self._renderer.opening(opening_messages(problem, self._config))
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
