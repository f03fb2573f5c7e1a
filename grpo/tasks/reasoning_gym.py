"""Generated data sets of reasoning-gym (extra `reasoning-gym`) with the library's scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.errors import ConfigError
from grpo.tasks.base import Split
from grpo.types import Problem

_HELD_OUT_SEED = 1 << 30  # far from the seeds of training


class ReasoningGym:
    """The data set `dataset` of reasoning-gym, generated with the library's own `settings`.

    The answer is the text in <answer> tags, or the whole completion without any. Scores are reasoning-gym's, in [0, 1],
    with partial credit.
    """

    def __init__(
        self,
        dataset: str = "gsm_symbolic",
        settings: Mapping[str, Any] | None = None,
        train_size: int = 2000,
        held_out_size: int = 200,
        seed: int = 0,
    ) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.utils import extract_answer
        except ImportError as error:
            raise ConfigError("needs reasoning-gym: pip install -e '.[reasoning-gym]'", key="task.target") from error
        self._extract = extract_answer
        try:
            make, settings = reasoning_gym.create_dataset, dict(settings or {})
            self._dataset = make(dataset, seed=seed, size=train_size, **settings)
            held_out = make(dataset, seed=_HELD_OUT_SEED + seed, size=held_out_size, **settings)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"reasoning-gym rejects {dataset!r} with {settings}: {error}", key="task.args") from error
        reserved = {entry["question"] for entry in held_out}
        train = [entry for entry in self._dataset if entry["question"] not in reserved]
        self._splits = {"train": list(map(_problem, train)), "held_out": list(map(_problem, held_out))}

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def score(self, problem: Problem, completion: str) -> float:
        answer = self._extract(completion)
        entry = {"question": problem.question, "answer": problem.answer, "metadata": problem.metadata}
        return float(self._dataset.score_answer(completion.strip() if answer is None else answer, entry))


def _problem(entry: Mapping[str, Any]) -> Problem:
    return Problem(entry["question"], answer=str(entry["answer"]), metadata=entry["metadata"])
