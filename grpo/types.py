"""Every noun of the system, and every error it raises.

Shape suffixes used throughout the package:

    B sequences of a batch   T tokens   G completions of one group   V vocabulary   P groups per train step

A worked example, one group with G = 2:

    problem = Problem(question="sort: dbca", answer="abcd")
    prompt = Prompt(serial=7, problem=problem, token_ids=np.array([5, 3, 2, 0, 4]))     # the 8th of the stream
    right = Completion(token_ids=np.array([0, 2, 3, 5, 1]),                             # "abcd" and the eos token
                       logprobs=np.array([-0.4, -0.1, 0.0, 0.0, 0.0]),                  # under the weights that sampled
                       versions=((3, 2), (4, 3)),                                       # 2 tokens by v3, 3 tokens by v4
                       finish_reason="stop")
    wrong = Completion(...)
    group = Group(prompt, [right, wrong], reference_logprobs=None, rewards=(1.0, 0.0),
                  advantages=(0.707, -0.707), oldest_version=3)

Trained on by a trainer at version 4, this group has age 4 - 3 = 1.
"""

# MERGED: How a command may end, and what it tells the shell.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
FinishReason = Literal["stop", "length"]
Detail = Literal["rewards", "texts", "tokens"]  # how much of a group comes with its scores; each includes those before


@dataclass(frozen=True)
class Problem:
    """What a task asks, and what is needed to score an answer."""

    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A problem as tokens. `serial` is its place in the run's endless stream of problems, and seeds the sampling.

    `problem_index` is the problem's place among those of the task to train on; -1 where it is none of them.
    """

    serial: int
    problem: Problem
    token_ids: Ints
    problem_index: int = -1


@dataclass(frozen=True)
class PromptBatch:
    """Prompts handed out together, and where the stream goes on. Serials between them were skipped.

    `left_out` are those of problems that the caller wanted left out; the other prompts were over the length limit.
    """

    prompts: tuple[Prompt, ...]
    next_serial: int
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch those filters off.

    `stop_token_ids` end a completion in addition to the model's own end-of-sequence tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `token_ids` and `logprobs` have shape [T]; the stop token, where there is one, is included. `logprobs` are natural
    logarithms under the distribution sampled from (temperature and filters applied). `versions` is the run-length
    encoding of the policy version behind each token: ((version, count), ...), counts summing to T.
    """

    token_ids: Ints
    logprobs: Floats
    versions: tuple[tuple[int, int], ...]
    finish_reason: FinishReason

    def __reduce__(self) -> tuple[Any, ...]:
        """As bytes, which pickle three times as fast as arrays: of short answers there are many."""
        token_ids, logprobs = np.asarray(self.token_ids, np.int64), np.asarray(self.logprobs, np.float32)
        return _completion, (token_ids.tobytes(), logprobs.tobytes(), self.versions, self.finish_reason)


def _completion(token_ids: bytes, logprobs: bytes, *rest: Any) -> Completion:
    return Completion(np.frombuffer(token_ids, np.int64), np.frombuffer(logprobs, np.float32), *rest)


@dataclass(frozen=True)
class GenerationReport:
    """The few numbers of a generated group that the driver needs; the tokens stay where they are."""

    oldest_version: int
    newest_version: int
    lengths: tuple[int, ...]  # tokens of each completion
    truncated: tuple[bool, ...]  # whether it ended because it had become too long

    @property
    def completion_count(self) -> int:
        return len(self.lengths)

    @property
    def token_count(self) -> int:
        return sum(self.lengths)

    @property
    def truncated_count(self) -> int:
        return sum(self.truncated)


@dataclass(frozen=True)
class Scores:
    """Rewards of one group: the weighted sum per completion and its parts by reward function.

    `texts` are the decoded completions, where they were asked for. `tokens`, likewise, is the JSON of a list for each
    completion: its tokens as [text, log-probability, policy version]. One string is light to carry.
    """

    rewards: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    texts: tuple[str, ...]
    tokens: str = ""


@dataclass(frozen=True)
class Group:
    """The completions of one prompt with rewards and advantages: never split, in the buffer or in a batch.

    In the driver `completions` and `reference_logprobs` are references to payloads; inside an actor they are values.
    `masked` are the places of completions that are not trained on, whatever their advantage.
    """

    prompt: Prompt
    completions: Sequence[Completion]
    reference_logprobs: Sequence[Floats] | None
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    oldest_version: int
    masked: tuple[int, ...] = ()

    @property
    def is_zero_variance(self) -> bool:
        """Whether nothing can be learned from it: no completion that is trained on has an advantage other than zero."""
        return not any(advantage and i not in self.masked for i, advantage in enumerate(self.advantages))


@dataclass(frozen=True)
class Rollout:
    """A finished group and what is said of it. Its advantages are of `shaped_rewards`: see algorithms/shaping.py."""

    group: Group
    scores: Scores
    report: GenerationReport
    shaped_rewards: tuple[float, ...]


@dataclass(frozen=True, order=True)
class Ticket:
    """The right to have one group begun and not yet trained-and-published. `serial` is the order of admission."""

    serial: int


@dataclass(frozen=True)
class Batch:
    """The P groups of one train step."""

    groups: Sequence[Group]


@dataclass(frozen=True)
class BatchReport:
    """What the driver needs to know of a batch whose groups travel from the buffer to the trainer.

    By group: its ticket, the rewards and the lengths in tokens of its completions, and its oldest policy version.
    `groups_waiting` counts the finished groups that stay behind.
    """

    tickets: tuple[Ticket, ...]
    rewards: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    oldest_versions: tuple[int, ...]
    groups_waiting: int


@dataclass(frozen=True)
class GeneratorStats:
    """Counters since the generator started: seconds of decoding work and tokens sampled.

    `process` is a name that no other process has: a replacement counts from zero.
    """

    busy_s: float
    tokens: int
    process: str = ""


@dataclass(frozen=True)
class EvaluationReport:
    """How one policy version answers the held-out prompts.

    `step` is that version. `pass_at` maps k to pass@k. `reward_stderr` is the standard error of the mean over prompts,
    NaN for a single one. Prompts left out are those whose reward failed; the counts of tokens are without them.
    """

    step: int
    prompts: int
    prompts_left_out: int
    reward_mean: float
    reward_stderr: float
    pass_at: Mapping[int, float]
    completion_count: int
    token_count: int
    truncated_count: int
    seconds: float

    def as_record(self) -> dict[str, float]:
        """The numbers by the names under which files show them."""
        return {
            "step": self.step,
            "prompts": self.prompts,
            "prompts_left_out": self.prompts_left_out,
            "reward_mean": self.reward_mean,
            "reward_stderr": self.reward_stderr,
            **{f"pass@{k}": value for k, value in self.pass_at.items()},
            "completion_tokens_mean": self.token_count / max(1, self.completion_count),
            "truncated_fraction": self.truncated_count / max(1, self.completion_count),
            "seconds": self.seconds,
            "tokens_per_s": self.token_count / self.seconds,
        }


def evaluation_report(record: Mapping[str, Any]) -> EvaluationReport:
    """The inverse of `dataclasses.asdict`, also of a record that JSON has held."""
    pass_at = {int(k): value for k, value in record["pass_at"].items()}
    stderr = record["reward_stderr"]
    return EvaluationReport(**{**record, "pass_at": pass_at, "reward_stderr": math.nan if stderr is None else stderr})


Status = Literal["completed", "failed", "interrupted"]
EXIT_CODES: dict[Status, int] = {"completed": 0, "failed": 1, "interrupted": 130}  # 128 + SIGINT, as shells have it
