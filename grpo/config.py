"""Every setting, one dataclass per config group, registered with Hydra; and the checks that need nothing heavy.

`configs/` holds the values; the types, the meanings and the limits are here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from grpo.pacing import age_bound, ticket_capacity
from grpo.types import ConfigError


@dataclass
class ModelConfig:
    """The model that is trained: every actor loads it from `path`."""

    path: str | None = None  # a Hugging Face folder or hub name
    prepare: str | None = None  # or `module:function` that makes the folder, called with the task and `args`
    args: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # of generators, reference and published weights
    trust_remote_code: bool = False


@dataclass
class TaskConfig:
    """Prompts and scoring."""

    target: str = MISSING  # `module:Class`, called with `args`
    args: dict[str, Any] = field(default_factory=dict)
    template: str = "plain"  # plain: the question as it is; chat: the tokenizer's chat template
    system_prompt: str | None = None  # with template=chat


@dataclass
class RolloutConfig:
    """How groups are made."""

    concurrency: int = 32  # continuous_rollouts coroutines
    group_size: int = 8  # G
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 512


@dataclass
class RewardConfig:
    """What a completion earns: the weighted sum of reward functions."""

    functions: dict[str, float] = field(default_factory=lambda: {"task": 1.0})  # name or `module.function` -> weight
    on_error: str = "fail"  # fail: end the run; drop: drop the group and count it
    replicas: int = 1
    num_cpus: float = 0.0


@dataclass
class LossConfig:
    """The loss and the advantages; see grpo/algorithms."""

    name: str = "grpo"
    advantages: str = "group_norm"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0  # weight of the KL term to the reference model; 0: there is no reference


@dataclass
class BufferConfig:
    """Staleness: a group is at most this many versions older than the trainer when it is trained on."""

    max_policy_age: int = 1  # S; 0 is synchronous GRPO
    window: int = 1  # W: finished groups may overtake a straggler by W - 1 places; age bound S + ceil((W - 1) / P)


@dataclass
class TrainerConfig:
    """The optimizer and its steps."""

    max_steps: int = 100
    groups_per_step: int = 16  # P
    lr: float = 1e-6
    lr_schedule: str = "constant"  # constant, linear, cosine
    warmup_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 16384  # padded tokens of one forward and backward pass
    gradient_checkpointing: bool = False
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0  # of CPU arithmetic; 0: as many as num_cpus


@dataclass
class GeneratorConfig:
    """The engine that samples completions, and its replicas."""

    engine: str = "torch"  # torch, simulated
    replicas: int = 1
    weight_update: str = "in_flight"  # in_flight, in_flight_recompute, drain
    max_sequences: int = 256  # completions decoded together by one replica
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0
    args: dict[str, Any] = field(default_factory=dict)  # of the simulated engine


@dataclass
class ReferenceConfig:
    """The frozen model of the KL term; started only when loss.beta > 0."""

    replicas: int = 1
    micro_batch_tokens: int = 16384
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    threads: int = 0


@dataclass
class EvalConfig:
    """Held-out prompts, sampled once each at the start and at the end of a run."""

    prompts: int = 0


@dataclass
class ClusterConfig:
    """The Ray cluster."""

    address: str | None = None  # null: a cluster of our own on this machine; auto or host:port: join one
    start_timeout_s: float = 600.0


@dataclass
class WatchdogConfig:
    seconds: float = 1800.0  # a run in which no step is finished for so long fails


@dataclass
class ObserveConfig:
    log_every: int = 1  # steps between printed lines where stdout is no terminal
    rollouts_every: int = 16  # groups between those written to rollouts.jsonl


@dataclass
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    seed: int = 0
    dry_run: bool = False  # check, print the plan and exit

    @property
    def ticket_capacity(self) -> int:
        return ticket_capacity(self.trainer.groups_per_step, self.buffer.max_policy_age)

    @property
    def age_bound(self) -> int:
        return age_bound(self.trainer.groups_per_step, self.buffer.max_policy_age, self.buffer.window)

    @property
    def uses_reference(self) -> bool:
        return self.loss.beta > 0


def register() -> None:
    """Make the dataclasses known to Hydra as `base`, so that composed configs are typed and unknown keys refused."""
    ConfigStore.instance().store(name="base", node=RunConfig)


def to_yaml(config: RunConfig) -> str:
    """The config as it stands, in the form that Hydra reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_hydra(composed: DictConfig) -> RunConfig:
    """The typed config of a composed one. Raises ConfigError for a value that is missing, unknown, or out of range."""
    try:
        config = OmegaConf.to_object(composed)
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    for key in _keys(values):
        if not _declared(key):  # Hydra's `+key=value` gets past the types
            raise ConfigError(_unknown(key))
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf refused, as one line that names the key and, where one looks alike, the key meant."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return _unknown(str(cause.full_key))
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: has no value; set it on the command line or in the experiment"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    message = str(cause).partition("Config search path")[0]
    return " ".join(message.replace("\n\t", " ").split())


def _unknown(key: str) -> str:
    if _declared(key):
        return f"{key}: is not there yet; add it with a plus sign, +{key}=..."
    known = [name for name in _keys(OmegaConf.to_container(OmegaConf.structured(RunConfig))) if name]
    alike = difflib.get_close_matches(key, [*known, *(f.name for f in fields(RunConfig))], n=1)
    return f"{key}: no such key; " + (f"did you mean {alike[0]}?" if alike else "grpo/config.py lists them all")


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested dictionaries, down to the leaves."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _declared(key: str) -> bool:
    """Whether a dotted key is a field of the dataclasses, or lies below a free-form one."""
    owner: Any = RunConfig()
    for name in key.split("."):
        if not is_dataclass(owner):
            return isinstance(owner, dict)
        if name not in {f.name for f in fields(owner)}:
            return False
        owner = getattr(owner, name)
    return True


_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "task.template": ("plain", "chat"),
    "reward.on_error": ("fail", "drop"),
    "trainer.lr_schedule": ("constant", "linear", "cosine"),
    "generator.engine": ("torch", "simulated"),
    "generator.weight_update": ("in_flight", "in_flight_recompute", "drain"),
}

# key -> smallest value allowed, and why
_AT_LEAST = {
    "rollout.concurrency": (1, "without a rollout coroutine nothing is generated"),
    "rollout.group_size": (2, "advantages compare the completions of one prompt, so a group needs 2 or more"),
    "rollout.temperature": (0, "0 is greedy"),
    "rollout.top_k": (0, "0 switches the filter off"),
    "rollout.max_prompt_tokens": (1, "prompts have at least one token"),
    "rollout.max_completion_tokens": (1, "completions have at least one token"),
    "buffer.max_policy_age": (0, "0 is synchronous GRPO, 1 overlaps generation with one train step"),
    "buffer.window": (1, "1 trains on groups in the order of admission"),
    "trainer.max_steps": (1, "a run has at least one step"),
    "trainer.groups_per_step": (1, "a train step takes at least one group"),
    "trainer.lr": (0, "a learning rate is not negative"),
    "trainer.warmup_steps": (0, "0 starts at the full learning rate"),
    "trainer.weight_decay": (0, "0 switches it off"),
    "trainer.micro_batch_tokens": (1, "a sequence longer than this makes a micro-batch of its own"),
    "trainer.threads": (0, "0 takes as many as num_cpus"),
    "generator.replicas": (1, "somebody has to generate"),
    "generator.threads": (0, "0 takes as many as num_cpus"),
    "reward.replicas": (1, "somebody has to score"),
    "reference.replicas": (1, "set loss.beta=0 to do without a reference"),
    "reference.micro_batch_tokens": (1, "a sequence longer than this makes a micro-batch of its own"),
    "reference.threads": (0, "0 takes as many as num_cpus"),
    "loss.clip_low": (0, "0 clips every ratio below 1"),
    "loss.clip_high": (0, "0 clips every ratio above 1"),
    "loss.beta": (0, "0 switches the KL term off"),
    "eval.prompts": (0, "0 switches evaluation off"),
    "observe.log_every": (1, "1 prints every step"),
    "observe.rollouts_every": (1, "1 writes every group"),
    "seed": (0, "seeds are not negative"),
    **{
        f"{actor}.{resource}": (0, "0 reserves nothing")
        for actor in ("generator", "reference", "trainer")
        for resource in ("num_cpus", "num_gpus")
    },
    "reward.num_cpus": (0, "0 reserves nothing"),
}

_POSITIVE = ("trainer.max_grad_norm", "watchdog.seconds", "cluster.start_timeout_s")


def validate(config: RunConfig) -> None:
    """Check ranges, choices and what belongs together. Raises ConfigError naming the key and the fix."""
    for key, choices in _CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise ConfigError(f"{value!r} is not one of {', '.join(choices)}", key=key)
    for key, (least, why) in _AT_LEAST.items():
        if not _value(config, key) >= least:
            raise ConfigError(f"is {_value(config, key)}, must be at least {least}: {why}", key=key)
    for key in _POSITIVE:
        if not _value(config, key) > 0:
            raise ConfigError(f"is {_value(config, key)}, must be greater than 0", key=key)
    if not 0 < config.rollout.top_p <= 1:
        raise ConfigError(f"is {config.rollout.top_p}, must be in (0, 1]; 1 switches it off", key="rollout.top_p")
    if len(config.trainer.betas) != 2 or not all(0 <= beta < 1 for beta in config.trainer.betas):
        raise ConfigError(f"is {config.trainer.betas}, must be two numbers in [0, 1)", key="trainer.betas")
    for name, weight in config.reward.functions.items():
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of {name} is {weight}, must be finite", key="reward.functions")
    if config.generator.max_sequences < config.rollout.group_size:
        raise ConfigError(
            f"is {config.generator.max_sequences}, but a group of rollout.group_size={config.rollout.group_size} is "
            "decoded together: raise it or make groups smaller",
            key="generator.max_sequences",
        )
    if (config.model.path is None) == (config.model.prepare is None):
        raise ConfigError("set either model.path (with model=hf) or model.prepare", key="model.path")
    if not config.reward.functions:
        raise ConfigError("is empty; name at least one, for example {task: 1.0}", key="reward.functions")


def warnings(config: RunConfig) -> list[str]:
    """Settings that work, but not as one may think."""
    found = []
    if config.rollout.concurrency > config.ticket_capacity:
        found.append(
            f"rollout.concurrency={config.rollout.concurrency}: only {config.ticket_capacity} rollouts can ever run, "
            f"(max_policy_age {config.buffer.max_policy_age} + 1) x {config.trainer.groups_per_step} groups_per_step "
            "tickets; raise buffer.max_policy_age or lower the concurrency"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        found.append(
            "rollout.top_p and top_k cut the distribution that is sampled from, but not the trainer's: "
            "importance ratios are biased; train with top_p=1 and top_k=0"
        )
    if config.rollout.temperature == 0:
        found.append("rollout.temperature=0 makes all completions of a group equal: there will be nothing to learn")
    return found


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
