"""Scores completions with the configured reward functions. One replica of the reward service."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from grpo.config import RunConfig
from grpo.imports import import_target
from grpo.models.tokenizer import load_tokenizer
from grpo.rewards import REWARDS, RewardFunction
from grpo.tasks.base import Task
from grpo.tasks.encoding import make_task
from grpo.types import Completion, Problem, Prompt, RewardError, RewardTimeout, Scores


class Reward:
    """The weighted sum of reward functions, a thread for every group under way: a slow one holds up nobody else."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(config.rollout.concurrency, thread_name_prefix="reward")

    async def setup(self) -> None:
        self._tokenizer = load_tokenizer(self._config.model)
        task = make_task(self._config.task)
        weights = self._config.reward.functions
        self._functions = {name: (weight, reward_function(name, task)) for name, weight in weights.items()}

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Scores:
        """Scores of one group; its texts too for one in `observe.rollouts_every` prompts.

        Raises RewardError when a function raises or returns something unusable.
        """
        with_texts = prompt.serial % self._config.observe.rollouts_every == 0
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._score, prompt.problem, completions, with_texts)

    async def close(self) -> None:
        """Don't wait for user code that hangs: its process ends with this actor."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _score(self, problem: Problem, completions: Sequence[Completion], with_texts: bool) -> Scores:
        texts = self._tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        parts = {name: evaluate(name, function, problem, texts) for name, (_, function) in self._functions.items()}
        weights = [weight for weight, _ in self._functions.values()]
        rewards = tuple(
            sum(map(math.prod, zip(weights, scores, strict=True))) for scores in zip(*parts.values(), strict=True)
        )
        return Scores(rewards, parts, tuple(texts) if with_texts else ())


def reward_function(name: str, task: Task) -> RewardFunction:
    """`task`, an entry of REWARDS, or `module:function`. Raises ConfigError when there is no such function."""
    if name == "task":
        return lambda problem, texts: [task.score(problem, text) for text in texts]
    return import_target(REWARDS.get(name, name), key="reward.functions")


def evaluate(name: str, function: RewardFunction, problem: Problem, texts: Sequence[str]) -> tuple[float, ...]:
    """Call one reward function and check what it returns.

    Raises RewardError, or RewardTimeout where that is what happened, naming the reward and the prompt.
    """
    where = f"reward {name!r} on prompt {problem.question[:80]!r}"
    try:
        scores = tuple(float(score) for score in function(problem, texts))
    except RewardTimeout as error:
        raise RewardTimeout(f"{where}: {error}") from error
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever user code raises: the run's `reward.on_error` decides
        raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise RewardError(f"{where} returned {len(scores)} scores for {len(texts)} completions")
    if not all(math.isfinite(score) for score in scores):
        raise RewardError(f"{where} returned {scores}; rewards must be finite")
    return scores
