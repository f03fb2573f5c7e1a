"""GSM8K, grade school math word problems with a number as the answer, or a JSONL file of the same form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.errors import ConfigError
from grpo.rewards.final_answer import final_number, numbers_in, parse_number
from grpo.tasks.base import Split
from grpo.types import Problem

_HUB_NAME, _SUBSET = "openai/gsm8k", "main"
_LOCAL = "or set a local file, task.path=FILE.jsonl"
_HUB_TIMEOUT_S = 10.0


class GSM8K:
    """Word problems from the Hugging Face hub (extra `gsm8k`), or from the JSONL file `path`.

    The hub's test split is held out; of a file, the fraction `held_out_share`. A row has a question and an answer. The
    answer's number follows `####`, or is the whole answer. The reward is 1 if the completion's final answer is exactly
    that number, see `final_number`.

    `partial_credit` rewards a wrong final answer if the right number occurs elsewhere in the completion. It is divided
    by the count of different numbers there, because listing many numbers would earn it. Even so it rewards fewer
    numbers rather than better reasoning, so the default is 0.

    Raises ConfigError if the file or the hub can't be read, or a row has another form.
    """

    def __init__(
        self,
        path: str | None = None,
        question_field: str = "question",
        answer_field: str = "answer",
        held_out_share: float = 0.05,
        partial_credit: float = 0.0,
        seed: int = 0,
    ) -> None:
        for key, value in (("held_out_share", held_out_share), ("partial_credit", partial_credit)):
            if not 0 <= value < 1:
                raise ConfigError(f"is {value}, must be at least 0 and less than 1", key=f"task.args.{key}")
        self._partial_credit = partial_credit
        fields = (question_field, answer_field)
        if path is None:
            self._splits = _from_hub(fields)
        else:
            self._splits = _split(_from_file(Path(path).expanduser(), fields), held_out_share, seed)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def score(self, problem: Problem, completion: str) -> float:
        expected = parse_number(problem.answer)
        if final_number(completion) == expected:
            return 1.0
        mentioned = set(numbers_in(completion)) if self._partial_credit else set()
        return self._partial_credit / len(mentioned) if expected in mentioned else 0.0


def _split(problems: Sequence[Problem], held_out_share: float, seed: int) -> dict[Split, list[Problem]]:
    """Hold out a fraction of the questions. A question that occurs twice is in one split only."""
    questions = list(dict.fromkeys(problem.question for problem in problems))
    order = np.random.default_rng(seed).permutation(len(questions))
    held_out = {questions[i] for i in order[: round(len(questions) * held_out_share)]}
    return {
        "train": [problem for problem in problems if problem.question not in held_out],
        "held_out": [problem for problem in problems if problem.question in held_out],
    }


def _from_file(path: Path, fields: tuple[str, str]) -> list[Problem]:
    try:
        problems = [_problem(row, fields, f"task.path: {where}") for where, row in _rows(path)]
    except OSError as error:
        raise ConfigError(f"can't read {str(path)!r}: {error.strerror}", key="task.path") from error
    if not problems:
        raise ConfigError(f"{str(path)!r} holds no problems", key="task.path")
    return problems


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (FILE:LINE, value) for every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    got = _shown(line.decode(errors="replace"))
                    raise ConfigError(f"{path}:{number}: expected a JSON object, got {got}", key="task.path") from error


def _problem(row: Any, fields: tuple[str, str], where: str) -> Problem:
    """Check a row. Raises ConfigError, whose message begins with `where`."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {_shown(row)}")
    for name in fields:
        if name not in row:
            raise ConfigError(f"{where}: expected the fields {' and '.join(fields)}, got {_shown(list(row))}")
    question, answer = (row[name] for name in fields)
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{where}: expected text in {fields[0]!r}, got {_shown(question)}")
    number = str(answer).rpartition("####")[2].strip()
    if not isinstance(answer, (str, int, float)) or parse_number(number) is None:
        raise ConfigError(f"{where}: expected a number, alone or after ####, in {fields[1]!r}, got {_shown(answer)}")
    return Problem(question, number)


def _from_hub(fields: tuple[str, str]) -> dict[Split, list[Problem]]:
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            f"GSM8K comes from the Hugging Face hub: pip install -e '.[gsm8k]', {_LOCAL}", key="task.target"
        ) from error
    unreachable: Exception | None = None
    try:
        HfApi().dataset_info(_HUB_NAME, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # its type depends on the hub's HTTP library; `datasets` would retry for 20 s
        unreachable = error
        datasets.config.HF_HUB_OFFLINE = True  # finds earlier downloads
    try:
        loaded = datasets.load_dataset(_HUB_NAME, _SUBSET)
    except Exception as error:  # its type depends on the hub's HTTP library, too
        reason = " ".join(str(unreachable or error).split())
        raise ConfigError(
            f"can't load {_HUB_NAME} from the Hugging Face hub ({reason}); connect to it, {_LOCAL}", key="task.target"
        ) from error
    names: dict[Split, str] = {"train": "train", "held_out": "test"}
    return {
        split: [_problem(row, fields, f"task.args: {_HUB_NAME}:{name}:{i}") for i, row in enumerate(loaded[name])]
        for split, name in names.items()
    }


def _shown(value: Any) -> str:
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
