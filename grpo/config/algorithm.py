"""Settings of the algorithm: task, rollouts, rewards, loss and staleness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from grpo.config.fields import FiniteFloat, Form, Fraction, Hint, PositiveFloat, Settings


@dataclass
class TaskConfig(Settings):
    """Prompts and scoring."""

    target: str = "???"
    """Task class as `module:Class`; called with `args`. Required."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task class."""

    path: str | None = None
    """File with the problems, for tasks that read one."""

    template: Literal["plain", "chat"] = "plain"
    """Prompt format. plain: the question unchanged; chat: the tokenizer's chat template."""

    renderer: str | None = None
    """With template=chat, what writes messages and reads answers instead of the tokenizer's template: a renderer of the
    package `renderers` (extra) such as qwen3.5 or llama-3; auto takes the one for the model's hub name."""

    system_prompt: str | None = None
    """System message with template=chat; null keeps the template's default."""


@dataclass
class DataloaderConfig(Settings):
    """Selection of training prompts."""

    sampling: Literal["uniform", "difficulty"] = "uniform"
    """uniform: each problem once per epoch; difficulty: mostly skip problems whose last group was all right or all
    wrong."""

    revisit_fraction: Annotated[
        Fraction,
        Hint("0.1 is usual, or skipped problems never return; dataloader.sampling=uniform skips nothing"),
    ] = 0.1
    """Fraction of their turns that skipped problems keep, with sampling=difficulty."""


@dataclass
class RolloutConfig(Settings):
    """Sampling of groups: several completions of one prompt."""

    concurrency: Annotated[int, Ge(1), Hint("without a rollout coroutine nothing is generated")] | Literal["auto"] = 32
    """Number of rollout coroutines; auto: as many as keep the trainer busy."""

    target_trainer_idle: Annotated[float, Gt(0), Lt(1), Hint("fraction of its time that the trainer may wait")] = 0.1
    """Fraction of its time that the trainer may wait, with concurrency=auto; see grpo/driver/pacing.py."""

    group_size: Annotated[
        int, Ge(2), Hint("advantages compare the completions of one prompt, so a group needs 2 or more")
    ] = 8
    """Completions per prompt (G)."""

    temperature: Annotated[float, Ge(0), Hint("0 is greedy")] = 1.0
    """Sampling temperature; 0 is greedy."""

    top_p: Annotated[Fraction, Hint("1 switches it off")] = 1.0
    """Nucleus sampling: smallest set of tokens with this probability; 1 switches it off."""

    top_k: Annotated[int, Ge(0), Hint("0 switches the filter off")] = 0
    """Number of most likely tokens to sample from; 0 switches it off."""

    max_prompt_tokens: Annotated[int, Ge(1), Hint("prompts have at least one token")] = 512
    """Longest prompt in tokens; longer prompts are skipped."""

    max_completion_tokens: Annotated[int, Ge(1), Hint("completions have at least one token")] = 512
    """Longest completion in tokens; longer ones are cut off."""


@dataclass
class EnvironmentConfig(Settings):
    """Episodes of several turns, for tasks with an environment or with tools; see docs/environments.md.

    `rollout.max_completion_tokens` bounds a whole episode after its prompt.
    """

    tools: list[str] = field(default_factory=list)
    """Functions as `module:function` that the policy may call while it answers the task's questions."""

    max_turns: Annotated[int, Ge(1), Hint("1 gives the policy a single turn")] = 16
    """Turns of the policy in an episode."""

    max_turn_tokens: Annotated[int, Ge(1), Hint("null bounds only the episode")] | None = None
    """Longest turn in tokens; null: what is left of rollout.max_completion_tokens."""

    max_reply_tokens: Annotated[int, Ge(32), Hint("a note about the cut has to fit")] = 1024
    """Longest message of an environment in tokens; longer ones are cut in the middle, and say so."""

    timeout_s: PositiveFloat = 60.0
    """Seconds of an episode that the environment may take. Waiting for the generator does not count."""

    on_limit: Literal["score", "zero"] = "score"
    """When a limit ends an episode. score: ask the environment for its reward; zero: the reward is 0."""

    on_error: Literal["fail", "drop"] = "fail"
    """When an environment raises, hangs or dies. fail: end the run; drop: drop the group and count it."""

    threads: Annotated[int, Ge(1), Hint("methods that are not async run in threads")] = 32
    """Threads per replica for methods that are not async."""

    replicas: Annotated[int, Ge(1), Hint("at least one replica is needed")] = 1
    """Environment actors."""

    num_cpus: Annotated[float, Ge(0), Hint("0 reserves nothing")] = 0.0
    """CPU cores that Ray reserves for each replica."""


@dataclass
class RewardConfig(Settings):
    """Reward of a completion: the weighted sum of reward functions."""

    functions: Annotated[
        dict[str, FiniteFloat], MinLen(1), Hint("name at least one reward function, for example {task: 1.0}")
    ] = field(default_factory=lambda: {"task": 1.0})
    """Reward functions and their weights; a key is a built-in name or `module:function`."""

    on_error: Literal["fail", "drop"] = "fail"
    """When a reward function fails. fail: end the run; drop: drop the group and count it."""

    timeout_s: PositiveFloat = 60.0
    """Seconds that scoring one group may take before its process is killed."""

    memory_gb: Annotated[float, Ge(0), Hint("0 sets no limit")] = 2.0
    """GiB that a reward process may allocate after its start; 0: no limit."""

    workers: Annotated[int, Ge(1), Hint("rewards run in processes of their own")] = 2
    """Processes per replica, each scoring one group at a time; raise it for rewards that wait for a judge."""

    replicas: Annotated[int, Ge(1), Hint("at least one replica is needed")] = 1
    """Reward actors."""

    num_cpus: Annotated[float, Ge(0), Hint("0 reserves nothing")] = 0.0
    """CPU cores that Ray reserves for each replica."""


@dataclass
class LossConfig(Settings):
    """The loss and the advantages; see grpo/algorithms. Parameters of the loss itself may be written without `args`."""

    name: str = "grpo"
    """Loss: a name in LOSSES (grpo/algorithms/losses.py), or `module:Class` for a PolicyLoss of your own."""

    advantages: str = "group_norm"
    """Advantage estimator: a name in ADVANTAGES (grpo/algorithms/advantages.py), or `module:function`."""

    aggregation: Literal["token_mean", "sequence_mean", "fixed_horizon"] | None = None
    """Averaging of per-token losses; null: the loss's default."""

    horizon: Annotated[int, Ge(1), Hint("the loss is divided by it")] | None = None
    """Tokens that fixed_horizon divides by; null: the longest completion of the batch."""

    beta: Annotated[float, Ge(0), Hint("0 switches the KL term off")] = 0.0
    """Weight of the KL term to the model before training; 0: no reference model is started."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term."""

    args: dict[str, Any] = field(default_factory=dict)
    """Parameters of the loss by name, like clip_low; without one the loss's default applies."""


@dataclass
class CorrectionConfig(Settings):
    """Importance weights for off-policy samples; see grpo/algorithms/corrections.py and configs/correction."""

    mode: Literal["none", "truncate", "mask"] = "none"
    """none: the loss's ratio is to the behavior policy. truncate, mask: it is to the proximal policy, and importance
    weights outside of the bounds are truncated, or their tokens masked."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """Unit of an importance ratio: one token, the sequence, or the geometric mean over its tokens."""

    min_ratio: Annotated[
        float, Ge(0), Le(1), Hint("importance weights are not negative, and an on-policy sample has weight 1")
    ] = 0.0
    """Lower bound of the importance ratio."""

    max_ratio: Annotated[float, Ge(1), Hint("an on-policy sample has weight 1")] | None = None
    """Upper bound of the importance ratio; null: none."""


@dataclass
class ShapingConfig(Settings):
    """Changes of a reward before the advantages: scaling, clipping and length penalties."""

    scale: Annotated[PositiveFloat, Form(math.isfinite, "finite")] = 1.0
    """Factor of the reward."""

    clip_low: FiniteFloat | None = None
    """Lower bound of the scaled reward; null: none."""

    clip_high: FiniteFloat | None = None
    """Upper bound of the scaled reward; null: none."""

    length_penalty: Annotated[float, Ge(0), Hint("0 does not penalize length")] = 0.0
    """Penalty of a completion of max_completion_tokens; shorter ones pay in proportion to their length."""

    overlong: Literal["keep", "mask", "penalize"] = "keep"
    """Completions cut off at the limit. keep: train on them; mask: leave them out of the loss; penalize: soft overlong
    punishment (DAPO, arXiv:2503.14476), which also applies shortly before the limit."""

    overlong_buffer: Annotated[
        float, Ge(0), Hint("with overlong=penalize, a fraction of rollout.max_completion_tokens")
    ] = 0.0
    """Last fraction of max_completion_tokens in which the penalty grows linearly, with overlong=penalize."""

    overlong_penalty: Annotated[float, Ge(0), Hint("it is subtracted from the reward")] = 1.0
    """Largest penalty, with overlong=penalize."""


@dataclass
class FilterConfig(Settings):
    """Groups that are dropped before they reach the trainer."""

    zero_variance: bool = False
    """Drop groups whose advantages are all zero, and generate others instead (dynamic sampling in DAPO)."""

    max_dropped_batches: Annotated[int, Ge(1), Hint("one batch of groups is soon dropped")] = 20
    """Batches of groups that may be dropped per batch that is kept; more end the run."""


@dataclass
class BufferConfig(Settings):
    """Staleness of the groups that are trained on."""

    max_policy_age: Annotated[int, Ge(0), Hint("0 is synchronous GRPO, 1 overlaps generation with one train step")] = 1
    """Train steps by which a group may lag behind the trainer (S); 0 is synchronous GRPO."""

    reorder_window: Annotated[int, Ge(1), Hint("1 trains on groups in the order of admission")] = 1
    """Window of reordering (W): finished groups may overtake a straggler by W - 1 places. The bound on the age becomes
    S + ceil((W - 1) / P)."""
