"""The checks of single settings: the values that each may have. A new engine or transport gets its name in here."""

from __future__ import annotations

import math
import re
from typing import Any

from grpo.config.schema import RunConfig
from grpo.errors import ConfigError

_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "sdpa", "eager"),
    "task.template": ("plain", "chat"),
    "dataloader.sampling": ("uniform", "difficulty"),
    "reward.on_error": ("fail", "drop"),
    "trainer.lr_schedule": ("constant", "linear", "cosine"),
    "trainer.packing": ("auto", "never"),
    "generator.engine": ("torch", "vllm", "simulated"),
    "watchdog.action": ("fail", "warn"),
    "loss.aggregation": (None, "token_mean", "sequence_mean", "fixed_horizon"),
    "loss.kl_estimator": ("k1", "k2", "k3"),
    "correction.mode": ("none", "truncate", "mask"),
    "correction.level": ("token", "sequence", "geometric"),
    "shaping.overlong": ("keep", "mask", "penalize"),
    "weight_sync.transport": ("object_store", "collective"),
    "weight_sync.backend": ("auto", "gloo", "nccl"),
    "generator.weight_update": ("in_flight", "in_flight_recompute", "drain"),
}
# key -> smallest value allowed, and why
_AT_LEAST = {
    "lora.rank": (0, "0 trains all weights"),
    "rollout.group_size": (2, "advantages compare the completions of one prompt, so a group needs 2 or more"),
    "rollout.temperature": (0, "0 is greedy"),
    "rollout.top_k": (0, "0 switches the filter off"),
    "rollout.max_prompt_tokens": (1, "prompts have at least one token"),
    "rollout.max_completion_tokens": (1, "completions have at least one token"),
    "buffer.max_policy_age": (0, "0 is synchronous GRPO, 1 overlaps generation with one train step"),
    "buffer.reorder_window": (1, "1 trains on groups in the order of admission"),
    "trainer.max_steps": (1, "a run has at least one step"),
    "trainer.groups_per_step": (1, "a train step takes at least one group"),
    "trainer.lr": (0, "a learning rate is not negative"),
    "trainer.warmup_steps": (0, "0 starts at the full learning rate"),
    "trainer.weight_decay": (0, "0 switches it off"),
    "trainer.micro_batch_tokens": (1, "a sequence longer than this makes a micro-batch of its own"),
    "trainer.max_nonfinite_steps": (0, "0 ends the run at the first one"),
    "trainer.snapshot_every": (0, "0 keeps none: a trainer that dies ends the run"),
    "trainer.ranks": (1, "1 trains in one process"),
    "trainer.threads": (0, "0 takes as many as num_cpus"),
    "generator.replicas": (1, "somebody has to generate"),
    "generator.threads": (0, "0 takes as many as num_cpus"),
    "reward.workers": (1, "rewards run in processes of their own"),
    "reward.memory_gb": (0, "0 sets no limit"),
    "reward.replicas": (1, "somebody has to score"),
    "reference.replicas": (1, "set loss.beta=0 to do without a reference"),
    "reference.micro_batch_tokens": (1, "a sequence longer than this makes a micro-batch of its own"),
    "reference.threads": (0, "0 takes as many as num_cpus"),
    "loss.horizon": (1, "the loss is divided by it"),
    "correction.max_ratio": (1, "1 is the weight of a sample of the present policy"),
    "shaping.length_penalty": (0, "0 lets answers be as long as they like"),
    "shaping.overlong_buffer": (0, "with overlong=penalize, a part of max_completion_tokens"),
    "shaping.overlong_penalty": (0, "it is taken off the reward"),
    "filter.max_dropped_batches": (1, "a batch's worth of groups is soon dropped"),
    "trainer.updates_per_batch": (1, "1 makes one optimizer step of a batch"),
    "loss.beta": (0, "0 switches the KL term off"),
    "eval.prompts": (0, "0 switches evaluation off"),
    "eval.every": (0, "0 evaluates only at the start and at the end"),
    "eval.samples": (1, "every prompt is answered at least once"),
    "eval.temperature": (0, "0 is greedy"),
    "eval.replicas": (0, "0 borrows the training's generators"),
    "eval.threads": (0, "0 takes as many as num_cpus"),
    "generator.tensor_parallel": (1, "1 keeps a replica on one GPU"),
    "recovery.max_restarts": (0, "0 ends the run with the first actor that dies"),
    "recovery.max_dropped_groups": (0, "0 ends the run at the first one"),
    "cluster.wait_for_nodes_s": (0, "0 waits for no node"),
    "checkpoint.every": (0, "0 makes none"),
    "checkpoint.keep": (1, "the newest one is never removed"),
    "observe.log_every": (1, "1 prints every step"),
    "observe.rollouts_every": (1, "1 writes every group"),
    "seed": (0, "seeds are not negative"),
    **{
        f"{actor}.{resource}": (0, "0 reserves nothing")
        for actor in ("eval", "generator", "reference", "trainer")
        for resource in ("num_cpus", "num_gpus")
    },
    "reward.num_cpus": (0, "0 reserves nothing"),
}
_POSITIVE = (
    "lora.alpha",
    "trainer.max_grad_norm",
    "watchdog.seconds",
    "recovery.health_interval_s",
    "recovery.health_timeout_s",
    "recovery.collective_timeout_s",
    "weight_sync.bucket_mb",
    "weight_sync.timeout_s",
    "reward.timeout_s",
    "cluster.start_timeout_s",
    "driver.slow_callback_ms",
    "observe.timeline_mb",
    "shaping.scale",
)
# key -> the interval that it must be in, and what else is said of it
_WITHIN = {
    "rollout.target_trainer_idle": ("(0, 1)", ": the share of its time that the trainer may wait"),
    "rollout.top_p": ("(0, 1]", "; 1 switches it off"),
    "dataloader.revisit_fraction": (
        "(0, 1]",
        ", or what is left out never comes back; 0.1 is usual, dataloader.sampling=uniform leaves nothing out",
    ),
    "correction.min_ratio": ("[0, 1]", ": importance weights are not negative, and that of a fresh sample is 1"),
    "lora.dropout": ("[0, 1)", "; 0 switches it off"),
    "generator.gpu_memory_fraction": ("(0, 1]", ": the share of each GPU"),
}
_FINITE = ("eval.temperature", "eval.success_threshold", "shaping.scale", "shaping.clip_low", "shaping.clip_high")


def check_limits(config: RunConfig) -> None:
    """Raises ConfigError naming the key and the fix. A setting that is null has no limits, unless it lists null."""
    for key, choices in _CHOICES.items():
        if (value := value_of(config, key)) not in choices:
            raise ConfigError(f"{value!r} is not one of {', '.join(map(_shown, choices))}", key=key)
    for key, (least, why) in _AT_LEAST.items():
        if (value := value_of(config, key)) is not None and not value >= least:
            raise ConfigError(f"is {value}, must be at least {least}: {why}", key=key)
    for key in _POSITIVE:
        if (value := value_of(config, key)) is not None and not value > 0:
            raise ConfigError(f"is {value}, must be greater than 0", key=key)
    for key, (interval, said) in _WITHIN.items():
        if not _is_within(value := value_of(config, key), interval):
            raise ConfigError(f"is {value}, must be in {interval}{said}", key=key)
    for key in _FINITE:
        if (value := value_of(config, key)) is not None and not math.isfinite(value):
            raise ConfigError(f"is {value}, must be finite", key=key)
    _check_forms(config)


def _check_forms(config: RunConfig) -> None:
    """Of settings that are not just a number or a word."""
    concurrency, targets = config.rollout.concurrency, config.lora.target_modules
    if concurrency != "auto" and (not isinstance(concurrency, int) or concurrency < 1):
        raise ConfigError(
            f"is {concurrency}, must be at least 1, or auto: without a rollout coroutine nothing is generated",
            key="rollout.concurrency",
        )
    if len(config.trainer.betas) != 2 or not all(0 <= beta < 1 for beta in config.trainer.betas):
        raise ConfigError(f"is {config.trainer.betas}, must be two numbers in [0, 1)", key="trainer.betas")
    if not config.reward.functions:
        raise ConfigError("is empty; name at least one, for example {task: 1.0}", key="reward.functions")
    for name, weight in config.reward.functions.items():
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of {name} is {weight}, must be finite", key="reward.functions")
    if config.cluster.address not in (None, "auto") and not re.fullmatch(r"[^/]+:\d+", str(config.cluster.address)):
        raise ConfigError(
            f"is {config.cluster.address!r}, must be auto or HOST:PORT; leave it out for a cluster on this machine",
            key="cluster.address",
        )
    listed = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
    if targets != "all-linear" and not listed:
        raise ConfigError(
            f"is {targets!r}, must be all-linear or a list of module names like [q_proj, v_proj]",
            key="lora.target_modules",
        )


def _is_within(value: float, interval: str) -> bool:
    """`interval` is one from 0 to 1, as mathematics writes it: a square bracket takes its end in."""
    return 0 < value < 1 or (value == 0 and interval[0] == "[") or (value == 1 and interval[-1] == "]")


def value_of(config: RunConfig, key: str) -> Any:
    """The setting with the dotted name `key`."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _shown(choice: str | None) -> str:
    return "null" if choice is None else choice
