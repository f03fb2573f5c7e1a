"""The nouns of the system as dataclasses, and the ways in which a command ends.

Shape suffixes used throughout the package:

    B sequences of a batch   T tokens   G completions of one group   V vocabulary   P groups per train step

A worked example: one group with G = 2.

    problem = Problem(question="sort: dbca", answer="abcd")
    prompt = Prompt(serial=7, problem=problem, token_ids=np.array([5, 3, 2, 0, 4]))     # the 8th prompt of the run
    right = Completion(token_ids=np.array([0, 2, 3, 5, 1]),                             # "abcd" and the eos token
                       logprobs=np.array([-0.4, -0.1, 0.0, 0.0, 0.0]),                  # under the weights that sampled
                       versions=((3, 2), (4, 3)),                                       # 2 tokens by v3, 3 tokens by v4
                       finish_reason="stop")
    wrong = Completion(...)
    group = Group(prompt, [right, wrong], reference_logprobs=None, rewards=(1.0, 0.0),
                  advantages=(0.707, -0.707), oldest_version=3)

A trainer at version 4 trains on this group with age 4 - 3 = 1.

In an episode of several turns a completion holds all of them, and the environment's replies in between:

    guesses = Completion(token_ids=np.array([8, 1, 20, 9, 1]),        # "8<eos>", the reply "<", then "9<eos>"
                         logprobs=np.array([-1.2, 0.0, -0.7, 0.0]),   # of the 4 sampled tokens
                         versions=((3, 4),), finish_reason="stop",
                         turns=(Turn(sampled=2, given=1), Turn(sampled=2, reward=1.0)))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
FinishReason = Literal["stop", "length"]
EpisodeLimit = Literal["tokens", "timeout", "turns"]
EPISODE_LIMITS: tuple[EpisodeLimit, ...] = get_args(EpisodeLimit)
EpisodeEnd = EpisodeLimit | Literal["done"]
Detail = Literal["rewards", "texts", "tokens"]
"""Level of detail that scores carry; each level includes the levels before it."""


@dataclass(frozen=True)
class Problem:
    """A question, and the data with which a task scores an answer to it."""

    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A problem as tokens. `serial` is its position in the run's endless stream of prompts, and seeds the sampling.

    `problem_index` is the problem's index in the task's training problems; -1 for any other problem.
    """

    serial: int
    problem: Problem
    token_ids: Ints
    problem_index: int = -1


@dataclass(frozen=True)
class PromptBatch:
    """Prompts handed out together, and the serial at which the stream continues.

    Serials in between were skipped. `left_out` lists skipped serials whose problem the caller had excluded; the other
    skipped prompts were over the length limit.
    """

    prompts: tuple[Prompt, ...]
    next_serial: int
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """Settings of the sampler. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch those filters off.

    `stop_token_ids` end a completion in addition to the model's own end-of-sequence tokens. Random numbers depend on
    `seed`, on the number of the completion within its group, counted from `first_sample`, and on the place of the
    token, counted from `first_token`: no two turns of an episode use the same. `keep_prefix` says that another turn may
    follow, so that the engine may keep what it has computed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    first_sample: int = 0
    first_token: int = 0
    keep_prefix: bool = False


@dataclass(frozen=True)
class Turn:
    """One turn of an episode: what the policy said, and what it was given in return.

    `sampled` and `given` count tokens. The given ones follow the sampled ones: the environment's reply, and what the
    template writes around it. `reward` is the environment's for this turn.
    """

    sampled: int
    given: int = 0
    reward: float = 0.0
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True)
class Completion:
    """One sampled answer, or one episode of several turns. N of its T tokens were sampled, the others were given.

    `token_ids` has shape [T] and includes the stop tokens. `logprobs` has shape [N]: natural logarithms under the
    distribution that was sampled from (temperature and filters applied). `versions` is the run-length encoding of the
    policy version of each sampled token: ((version, count), ...), counts summing to N. Without `turns` all tokens were
    sampled. An episode ends with a sampled token: a last reply, which nothing answers, is not among its tokens.
    """

    token_ids: Ints
    logprobs: Floats
    versions: tuple[tuple[int, int], ...]
    finish_reason: FinishReason
    turns: tuple[Turn, ...] = ()

    @property
    def sampled_count(self) -> int:
        return len(self.logprobs)

    def sampled_places(self) -> Ints:
        """Return the indices [N] of the sampled tokens in `token_ids`."""
        if not self.turns:
            return np.arange(len(self.token_ids))
        runs = [(turn.sampled, turn.given) for turn in self.turns]
        return np.flatnonzero(np.repeat([True, False] * len(runs), np.ravel(runs)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle arrays as bytes: three times as fast, which matters for many short answers."""
        token_ids, logprobs = np.asarray(self.token_ids, np.int64), np.asarray(self.logprobs, np.float32)
        rest = (self.versions, self.finish_reason, self.turns)
        return _completion, (token_ids.tobytes(), logprobs.tobytes(), *rest)


def _completion(token_ids: bytes, logprobs: bytes, *rest: Any) -> Completion:
    return Completion(np.frombuffer(token_ids, np.int64), np.frombuffer(logprobs, np.float32), *rest)


@dataclass(frozen=True)
class EpisodeReport:
    """The numbers of one episode: turns, given tokens, what ended it, and seconds spent waiting for each side.

    `metrics` are sums over its turns: of tool calls and their errors, and whatever its environment reports.
    """

    turns: int
    given: int
    ended_by: EpisodeEnd
    environment_s: float
    generator_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationReport:
    """The numbers of a generated group that the driver needs; the tokens stay with the generator's payload."""

    oldest_version: int
    newest_version: int
    lengths: tuple[int, ...]
    """Sampled tokens of each completion."""
    truncated: tuple[bool, ...]
    """For each completion, whether it ended for its length."""
    episodes: tuple[EpisodeReport, ...] = ()
    """One for each completion, if they are episodes."""

    @property
    def completion_count(self) -> int:
        return len(self.lengths)

    @property
    def token_count(self) -> int:
        return sum(self.lengths)

    @property
    def truncated_count(self) -> int:
        return sum(self.truncated)


def generation_report(completions: Sequence[Completion]) -> GenerationReport:
    """Return the report of a group."""
    versions = [version for completion in completions for version, _ in completion.versions]
    return GenerationReport(
        oldest_version=min(versions),
        newest_version=max(versions),
        lengths=tuple(completion.sampled_count for completion in completions),
        truncated=tuple(completion.finish_reason == "length" for completion in completions),
    )


@dataclass(frozen=True)
class TurnText:
    """A Turn for people to read: its texts without special tokens, and how many tokens they have."""

    sampled: str
    given: str
    reward: float
    finish_reason: FinishReason
    sampled_tokens: int
    given_tokens: int


@dataclass(frozen=True)
class Transcript:
    """An episode for people to read: the texts of its turns, and what ended it.

    Example:
        Transcript((TurnText("8", "<", 0.0, "stop", 2, 1), TurnText("5", "", 1.0, "stop", 2, 0)), ended_by="done")
    """

    turns: tuple[TurnText, ...]
    ended_by: EpisodeEnd

    def __str__(self) -> str:
        """Return the whole as one text; a line of what the policy was given begins with a bar."""
        texts = (text for turn in self.turns for text in (turn.sampled, indent(turn.given, "| ")))
        return "\n".join(text for text in texts if text)


@dataclass(frozen=True)
class Scores:
    """Rewards of one group: the weighted sum per completion, and its parts by reward function.

    `texts` holds the decoded completions if they were requested. `tokens`, if requested, is JSON: for each completion
    a list of its tokens as [text, log-probability, policy version]; given tokens have neither of the two. A single
    string is cheap to send. `transcripts` come with the texts if the completions are episodes.
    """

    rewards: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    texts: tuple[str, ...]
    tokens: str = ""
    transcripts: tuple[Transcript, ...] = ()


@dataclass(frozen=True)
class Group:
    """The completions of one prompt with rewards and advantages: never split, in the buffer or in a batch.

    In the driver `completions` and `reference_logprobs` are references to payloads; inside an actor they are values.
    `masked` holds the indices of completions that are never trained on, whatever their advantage.
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
        """True if no unmasked completion has a nonzero advantage: there is nothing to learn."""
        return not any(advantage and i not in self.masked for i, advantage in enumerate(self.advantages))


@dataclass(frozen=True)
class Rollout:
    """A finished group with its scores. Its advantages come from `shaped_rewards`; see algorithms/shaping.py."""

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
    """The numbers of a batch that the driver needs; the groups travel from the buffer to the trainer.

    One entry per group: its ticket, the rewards of its completions, their lengths in tokens, and its oldest policy
    version. `groups_waiting` counts the finished groups left in the buffer.
    """

    tickets: tuple[Ticket, ...]
    rewards: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    oldest_versions: tuple[int, ...]
    groups_waiting: int


@dataclass(frozen=True)
class GeneratorStats:
    """Counters since the generator started: seconds of decoding work and tokens sampled.

    `process` is unique to the process: a replacement has another name and counts from zero.
    """

    busy_s: float
    tokens: int
    process: str = ""


@dataclass(frozen=True)
class EvaluationReport:
    """Results of one policy version, `step`, on the held-out prompts.

    `pass_at` maps k to pass@k. `reward_stderr` is the standard error of the mean over prompts, NaN for a single prompt.
    Prompts are left out if their reward failed; token counts exclude them.
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
        """Return the numbers under the names that files and sinks use."""
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
    """Rebuild a report from `dataclasses.asdict`, also after a round trip through JSON."""
    pass_at = {int(k): value for k, value in record["pass_at"].items()}
    stderr = record["reward_stderr"]
    return EvaluationReport(**{**record, "pass_at": pass_at, "reward_stderr": math.nan if stderr is None else stderr})


Status = Literal["completed", "failed", "interrupted"]
EXIT_CODES: dict[Status, int] = {"completed": 0, "failed": 1, "interrupted": 130}  # 128 + SIGINT, as in shells
