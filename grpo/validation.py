"""The checks of a config that need nothing heavy: ranges, choices, and what belongs together."""

from __future__ import annotations

import math
import re
from typing import Any

from grpo.config import RunConfig
from grpo.types import ConfigError

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
    "loss.kl": ("k1", "k2", "k3"),
    "correction.weights": ("none", "truncate", "mask"),
    "correction.level": ("token", "sequence", "geometric"),
    "shaping.overlong": ("keep", "mask", "penalize"),
    "weights.transport": ("object_store", "collective"),
    "weights.backend": ("auto", "gloo", "nccl"),
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
    "buffer.window": (1, "1 trains on groups in the order of admission"),
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
    "loss.clip_low": (0, "0 clips every ratio below 1"),
    "loss.clip_high": (0, "0 clips every ratio above 1"),
    "loss.dual_clip": (1, "it bounds the loss at so many times the advantage"),
    "loss.horizon": (1, "the loss is divided by it"),
    "loss.max_tv": (0, "0 stops every token that moves"),
    "correction.low": (0, "importance weights are not negative"),
    "correction.high": (1, "1 is the weight of a sample of the present policy"),
    "shaping.length_penalty": (0, "0 lets answers be as long as they like"),
    "shaping.overlong_zone": (0, "with overlong=penalize, a part of max_completion_tokens"),
    "shaping.overlong_penalty": (0, "it is taken off the reward"),
    "filter.max_batches": (1, "a batch's worth of groups is soon dropped"),
    "trainer.updates_per_batch": (1, "1 makes one optimizer step of a batch"),
    "loss.beta": (0, "0 switches the KL term off"),
    "eval.prompts": (0, "0 switches evaluation off"),
    "eval.every": (0, "0 evaluates only at the start and at the end"),
    "eval.samples": (1, "every prompt is answered at least once"),
    "eval.replicas": (0, "0 borrows the training's generators"),
    "eval.threads": (0, "0 takes as many as num_cpus"),
    "generator.tensor_parallel": (1, "1 keeps a replica on one GPU"),
    "recovery.max_restarts": (0, "0 ends the run with the first actor that dies"),
    "recovery.max_data_failures": (0, "0 ends the run at the first one"),
    "cluster.nodes_timeout_s": (0, "0 waits for no node"),
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
    "recovery.health_every_s",
    "recovery.health_timeout_s",
    "recovery.collective_timeout_s",
    "weights.bucket_mb",
    "weights.timeout_s",
    "reward.timeout_s",
    "cluster.start_timeout_s",
    "driver.slow_callback_ms",
    "observe.timeline_mb",
    "loss.max_ratio",
    "loss.tau_positive",
    "loss.tau_negative",
    "shaping.scale",
)


def validate(config: RunConfig) -> None:
    """Check ranges, choices and what belongs together. Raises ConfigError naming the key and the fix."""
    for key, choices in _CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise ConfigError(f"{value!r} is not one of {', '.join(map(_shown, choices))}", key=key)
    for key, (least, why) in _AT_LEAST.items():
        if (value := _value(config, key)) is not None and not value >= least:
            raise ConfigError(f"is {value}, must be at least {least}: {why}", key=key)
    for key in _POSITIVE:
        if (value := _value(config, key)) is not None and not value > 0:
            raise ConfigError(f"is {value}, must be greater than 0", key=key)
    concurrency = config.rollout.concurrency
    if concurrency != "auto" and (not isinstance(concurrency, int) or concurrency < 1):
        raise ConfigError(
            f"is {concurrency}, must be at least 1, or auto: without a rollout coroutine nothing is generated",
            key="rollout.concurrency",
        )
    if not 0 < config.rollout.target_wait < 1:
        raise ConfigError(
            f"is {config.rollout.target_wait}, must be in (0, 1): the share of its time that the trainer may wait",
            key="rollout.target_wait",
        )
    if not 0 < config.rollout.top_p <= 1:
        raise ConfigError(f"is {config.rollout.top_p}, must be in (0, 1]; 1 switches it off", key="rollout.top_p")
    if not 0 < config.dataloader.revisit <= 1:
        raise ConfigError(
            f"is {config.dataloader.revisit}, must be in (0, 1], or what is left out never comes back; 0.1 is usual, "
            "dataloader.sampling=uniform leaves nothing out",
            key="dataloader.revisit",
        )
    if len(config.trainer.betas) != 2 or not all(0 <= beta < 1 for beta in config.trainer.betas):
        raise ConfigError(f"is {config.trainer.betas}, must be two numbers in [0, 1)", key="trainer.betas")
    for name, weight in config.reward.functions.items():
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of {name} is {weight}, must be finite", key="reward.functions")
    if (config.model.path is None) == (config.model.prepare is None):
        raise ConfigError("set either model.path (with model=hf) or model.prepare", key="model.path")
    if config.cluster.dashboard and config.cluster.address is not None:
        raise ConfigError(
            "is for a cluster of the run's own; the one at cluster.address has its own or none: leave it out",
            key="cluster.dashboard",
        )
    if config.cluster.address not in (None, "auto") and not re.fullmatch(r"[^/]+:\d+", str(config.cluster.address)):
        raise ConfigError(
            f"is {config.cluster.address!r}, must be auto or HOST:PORT; leave it out for a cluster on this machine",
            key="cluster.address",
        )
    if not config.reward.functions:
        raise ConfigError("is empty; name at least one, for example {task: 1.0}", key="reward.functions")
    _validate_lora(config)
    _validate_algorithm(config)
    _validate_ranks(config)
    _validate_gpus(config)
    _validate_generator(config)
    _validate_weights(config)
    _validate_evaluation(config)


def _validate_lora(config: RunConfig) -> None:
    targets = config.lora.target_modules
    listed = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
    if targets != "all-linear" and not listed:
        raise ConfigError(
            f"is {targets!r}, must be all-linear or a list of module names like [q_proj, v_proj]",
            key="lora.target_modules",
        )
    if not 0 <= config.lora.dropout < 1:
        raise ConfigError(f"is {config.lora.dropout}, must be in [0, 1); 0 switches it off", key="lora.dropout")


def _validate_algorithm(config: RunConfig) -> None:
    updates, groups, correction = config.trainer.updates_per_batch, config.trainer.groups_per_step, config.correction
    if updates > groups:
        raise ConfigError(
            f"is {updates}, but a batch has {groups} groups (trainer.groups_per_step), which are not split: lower it",
            key="trainer.updates_per_batch",
        )
    if correction.weights == "none" and (correction.low, correction.high) != (0, None):
        raise ConfigError(
            "no weights are there to bound; take correction=tis, mis, icepop or decoupled", key="correction.weights"
        )
    if correction.low > 1:
        raise ConfigError(f"is {correction.low}, must be at most 1, the weight of a fresh sample", key="correction.low")
    for key in ("shaping.scale", "shaping.clip_low", "shaping.clip_high"):
        if (value := _value(config, key)) is not None and not math.isfinite(value):
            raise ConfigError(f"is {value}, must be finite", key=key)
    low, high, zone = config.shaping.clip_low, config.shaping.clip_high, config.shaping.overlong_zone
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"is {low}, must be below shaping.clip_high={high}", key="shaping.clip_low")
    if (config.shaping.overlong == "penalize") != (zone > 0) or zone > 1:
        raise ConfigError(
            f"is {zone:g} with shaping.overlong={config.shaping.overlong}; penalize needs a part of "
            "rollout.max_completion_tokens, like 0.2, the others 0",
            key="shaping.overlong_zone",
        )
    if config.loss.advantages == "max_rl" and (
        config.shaping.length_penalty > 0 or config.shaping.overlong == "penalize"
    ):
        raise ConfigError(
            "max_rl takes rewards of 0 and more, which a penalty for length goes below: take another, or no penalty",
            key="loss.advantages",
        )


def _validate_ranks(config: RunConfig) -> None:
    ranks, num_cpus, num_gpus = config.trainer.ranks, config.trainer.num_cpus, config.trainer.num_gpus
    if ranks > 1 and num_gpus not in (0, 1):
        raise ConfigError(
            f"is {num_gpus:g}, but each of trainer.ranks={ranks} computes on a GPU of its own, or on none: 1 or 0",
            key="trainer.num_gpus",
        )
    if ranks > 1 and num_cpus == num_gpus == 0:
        raise ConfigError(
            f"is 0, but trainer.ranks={ranks} are placed by what each reserves: a part of a core is enough, like 0.5",
            key="trainer.num_cpus",
        )


def _validate_gpus(config: RunConfig) -> None:
    """One computes all that is not spread over several, as vLLM is: that is checked with the rest of it."""
    if (num_gpus := config.trainer.num_gpus) > 1:
        raise ConfigError(
            f"is {num_gpus:g}, but a process of the trainer computes on one GPU: set it to 1, and trainer.ranks to how "
            "many there are to be",
            key="trainer.num_gpus",
        )
    for group in ("reference", *(("generator", "eval") if config.generator.engine != "vllm" else ())):
        if (num_gpus := _value(config, f"{group}.num_gpus")) > 1:
            raise ConfigError(
                f"is {num_gpus:g}, but each computes on one GPU: set it to 1, and {group}.replicas to how many there "
                "are to be",
                key=f"{group}.num_gpus",
            )


def _validate_generator(config: RunConfig) -> None:
    most = config.generator.max_replicas
    if most is not None and most < config.generator.replicas:
        raise ConfigError(
            f"is {most}, less than generator.replicas={config.generator.replicas}; raise it or leave it out",
            key="generator.max_replicas",
        )
    if config.generator.max_sequences < config.rollout.group_size:
        raise ConfigError(
            f"is {config.generator.max_sequences}, but a group of rollout.group_size={config.rollout.group_size} is "
            "decoded together: raise it or make groups smaller",
            key="generator.max_sequences",
        )
    if config.generator.tensor_parallel > 1 and config.generator.engine != "vllm":
        raise ConfigError("only the vllm engine spreads a model over GPUs", key="generator.tensor_parallel")
    if config.generator.engine == "vllm":
        _validate_vllm(config)
    if not 0 < config.generator.gpu_memory_fraction <= 1:
        raise ConfigError(
            f"is {config.generator.gpu_memory_fraction}, must be in (0, 1]", key="generator.gpu_memory_fraction"
        )


def _validate_weights(config: RunConfig) -> None:
    if config.weights.backend != "nccl":
        return
    if config.generator.engine != "torch":
        raise ConfigError(
            f"the {config.generator.engine} engine has no GPU in the actor's process; take auto or gloo",
            key="weights.backend",
        )
    for key in ("trainer.num_gpus", "generator.num_gpus"):
        if (num_gpus := _value(config, key)) < 1:
            raise ConfigError(
                f"nccl needs whole GPUs, and {key} is {num_gpus:g}: raise it, or take auto or gloo",
                key="weights.backend",
            )

    if config.trainer.ranks > 1:
        raise ConfigError(
            f"nccl takes a trainer of one rank, and trainer.ranks is {config.trainer.ranks}, which talk over it at the "
            "same time, so that each may wait for the other: take auto or gloo",
            key="weights.backend",
        )


def _validate_vllm(config: RunConfig) -> None:
    for key in ("rollout.temperature", "eval.temperature"):
        if (temperature := _value(config, key)) is not None and temperature > 2:
            raise ConfigError(f"is {temperature}, vLLM takes at most 2", key=key)
    on_gpus = config.generator.num_gpus > 0
    for group in ("generator", *(["eval"] if config.uses_evaluator else [])):
        num_gpus, tensor_parallel = _value(config, f"{group}.num_gpus"), config.generator.tensor_parallel
        fits = num_gpus == tensor_parallel or (tensor_parallel == 1 and 0 < num_gpus < 1)
        if not (fits if on_gpus else num_gpus == 0):
            needed = (tensor_parallel if tensor_parallel > 1 else "1, or a part of one") if on_gpus else "0"
            raise ConfigError(
                f"is {num_gpus:g}; with generator.num_gpus={config.generator.num_gpus:g} and "
                f"generator.tensor_parallel={tensor_parallel} it must be {needed}",
                key=f"{group}.num_gpus",
            )


def _validate_evaluation(config: RunConfig) -> None:
    samples, temperature = config.eval.samples, config.eval.temperature
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError(f"is {temperature}, must be at least 0 (greedy)", key="eval.temperature")
    if not math.isfinite(config.eval.solved_at):
        raise ConfigError(f"is {config.eval.solved_at}, must be finite", key="eval.solved_at")
    if samples > 1 and (config.rollout.temperature if temperature is None else temperature) == 0:
        raise ConfigError(
            f"is {samples}, but at temperature 0 all completions of a prompt are equal: "
            "set it to 1, or eval.temperature above 0",
            key="eval.samples",
        )
    if samples > config.generator.max_sequences:
        raise ConfigError(
            f"is {samples}, but the completions of a prompt are decoded together and "
            f"generator.max_sequences={config.generator.max_sequences}: lower it or raise generator.max_sequences",
            key="eval.samples",
        )


def warnings(config: RunConfig) -> list[str]:
    """Settings that work, but not as one may think."""
    found = []
    if config.most_rollouts > config.ticket_capacity:
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
    groups_per_update = config.trainer.groups_per_step // config.trainer.updates_per_batch
    if config.trainer.ranks > groups_per_update:
        found.append(
            f"trainer.ranks={config.trainer.ranks}: an update has {groups_per_update} groups (trainer.groups_per_step, "
            "updates_per_batch), which are not split between ranks, so some have nothing to do"
        )
    if config.rollout.temperature == 0:
        found.append("rollout.temperature=0 makes all completions of a group equal: there will be nothing to learn")
    if config.shaping.length_penalty > 0 and config.filter.zero_advantage:
        found.append(
            "filter.zero_advantage: with shaping.length_penalty above 0 answers of other lengths have other rewards, "
            "so groups that are always right or never are hardly ever dropped"
        )
    if config.uses_adapters and config.lora.dropout > 0:
        found.append(
            f"lora.dropout={config.lora.dropout:g}: the trainer sees another distribution than was sampled from, so "
            "importance ratios are noisy; 0 is usual"
        )
    if config.loss.kl == "k1" and config.loss.beta > 0:
        found.append(
            "loss.kl=k1: its gradient has mean zero on samples of the policy, so it keeps nobody near the reference; "
            "take k2 or k3"
        )
    aggregation = config.loss.aggregation or ("fixed_horizon" if config.loss.name == "dr_grpo" else None)
    if aggregation == "fixed_horizon" and config.loss.horizon is None:
        found.append(
            "loss.horizon: without it fixed_horizon divides by the longest completion of the batch at hand, so a token "
            "weighs more in one batch than in another; set it to rollout.max_completion_tokens, as loss=dr_grpo does"
        )
    if "math_verify" in config.reward.functions and config.reward.on_error == "fail":
        found.append(
            "reward.functions: math_verify takes for ever on a few completions, and one of them ends the run after "
            "reward.timeout_s; reward.on_error=drop leaves its group out instead"
        )
    used = {"reference": config.uses_reference, "eval": config.uses_evaluator and config.generator.engine != "vllm"}
    found += [
        f"{group}.num_gpus=0: it computes on CPUs while the trainer has GPUs, far slower; give it one, or a part of one"
        for group in used
        if used[group] and config.trainer.num_gpus > 0 and _value(config, f"{group}.num_gpus") == 0
    ]
    if config.eval.every > 0 and config.eval.prompts == 0:
        found.append(f"eval.every={config.eval.every}: nothing is evaluated, eval.prompts is 0")
    elif config.eval.every >= config.trainer.max_steps:
        found.append(
            f"eval.every={config.eval.every}: there are {config.trainer.max_steps} steps (trainer.max_steps), so only "
            "the start and the end are evaluated"
        )
    return found


def _shown(choice: str | None) -> str:
    return "null" if choice is None else choice


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
