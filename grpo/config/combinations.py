"""The checks of settings that each may have, but not together."""

from __future__ import annotations

from grpo.config.limits import check_limits, value_of
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError


def check_combinations(config: RunConfig) -> None:
    """Raises ConfigError naming the key and the fix. The settings are each within their limits."""
    for check in (
        _check_model,
        _check_cluster,
        _check_updates,
        _check_correction,
        _check_shaping,
        _check_ranks,
        _check_gpus,
        _check_generator,
        _check_weights,
        _check_evaluation,
    ):
        check(config)


def _check_model(config: RunConfig) -> None:
    if (config.model.path is None) == (config.model.builder is None):
        raise ConfigError("set either model.path (with model=hf) or model.builder", key="model.path")


def _check_cluster(config: RunConfig) -> None:
    if config.cluster.dashboard and config.cluster.address is not None:
        raise ConfigError(
            "is for a cluster of the run's own; the one at cluster.address has its own or none: leave it out",
            key="cluster.dashboard",
        )


def _check_updates(config: RunConfig) -> None:
    updates, groups = config.trainer.updates_per_batch, config.trainer.groups_per_step
    if updates > groups:
        raise ConfigError(
            f"is {updates}, but a batch has {groups} groups (trainer.groups_per_step), which are not split: lower it",
            key="trainer.updates_per_batch",
        )


def _check_correction(config: RunConfig) -> None:
    correction = config.correction
    if correction.mode == "none" and (correction.min_ratio, correction.max_ratio) != (0, None):
        raise ConfigError(
            "no weights are there to bound; take correction=tis, mis, icepop or decoupled", key="correction.mode"
        )


def _check_shaping(config: RunConfig) -> None:
    low, high, zone = config.shaping.clip_low, config.shaping.clip_high, config.shaping.overlong_buffer
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"is {low}, must be below shaping.clip_high={high}", key="shaping.clip_low")
    if (config.shaping.overlong == "penalize") != (zone > 0) or zone > 1:
        raise ConfigError(
            f"is {zone:g} with shaping.overlong={config.shaping.overlong}; penalize needs a part of "
            "rollout.max_completion_tokens, like 0.2, the others 0",
            key="shaping.overlong_buffer",
        )
    if config.loss.advantages == "max_rl" and (
        config.shaping.length_penalty > 0 or config.shaping.overlong == "penalize"
    ):
        raise ConfigError(
            "max_rl takes rewards of 0 and more, which a penalty for length goes below: take another, or no penalty",
            key="loss.advantages",
        )


def _check_ranks(config: RunConfig) -> None:
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


def _check_gpus(config: RunConfig) -> None:
    """One computes all that is not spread over several, as vLLM is: that is checked with the rest of it."""
    if (num_gpus := config.trainer.num_gpus) > 1:
        raise ConfigError(
            f"is {num_gpus:g}, but a process of the trainer computes on one GPU: set it to 1, and trainer.ranks to how "
            "many there are to be",
            key="trainer.num_gpus",
        )
    for group in ("reference", *(("generator", "eval") if config.generator.engine != "vllm" else ())):
        if (num_gpus := value_of(config, f"{group}.num_gpus")) > 1:
            raise ConfigError(
                f"is {num_gpus:g}, but each computes on one GPU: set it to 1, and {group}.replicas to how many there "
                "are to be",
                key=f"{group}.num_gpus",
            )


def _check_generator(config: RunConfig) -> None:
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
        _check_vllm(config)


def _check_vllm(config: RunConfig) -> None:
    for key in ("rollout.temperature", "eval.temperature"):
        if (temperature := value_of(config, key)) is not None and temperature > 2:
            raise ConfigError(f"is {temperature}, vLLM takes at most 2", key=key)
    on_gpus = config.generator.num_gpus > 0
    for group in ("generator", *(["eval"] if config.uses_evaluator else [])):
        num_gpus, tensor_parallel = value_of(config, f"{group}.num_gpus"), config.generator.tensor_parallel
        fits = num_gpus == tensor_parallel or (tensor_parallel == 1 and 0 < num_gpus < 1)
        if not (fits if on_gpus else num_gpus == 0):
            needed = (tensor_parallel if tensor_parallel > 1 else "1, or a part of one") if on_gpus else "0"
            raise ConfigError(
                f"is {num_gpus:g}; with generator.num_gpus={config.generator.num_gpus:g} and "
                f"generator.tensor_parallel={tensor_parallel} it must be {needed}",
                key=f"{group}.num_gpus",
            )


def _check_weights(config: RunConfig) -> None:
    if config.weight_sync.backend != "nccl":
        return
    if config.generator.engine != "torch":
        raise ConfigError(
            f"the {config.generator.engine} engine has no GPU in the actor's process; take auto or gloo",
            key="weight_sync.backend",
        )
    for key in ("trainer.num_gpus", "generator.num_gpus"):
        if (num_gpus := value_of(config, key)) < 1:
            raise ConfigError(
                f"nccl needs whole GPUs, and {key} is {num_gpus:g}: raise it, or take auto or gloo",
                key="weight_sync.backend",
            )
    if config.trainer.ranks > 1:
        raise ConfigError(
            f"nccl takes a trainer of one rank, and trainer.ranks is {config.trainer.ranks}, which talk over it at the "
            "same time, so that each may wait for the other: take auto or gloo",
            key="weight_sync.backend",
        )


def _check_evaluation(config: RunConfig) -> None:
    samples, temperature = config.eval.samples, config.eval.temperature
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


def validate(config: RunConfig) -> None:
    """Check ranges, choices and what belongs together. Raises ConfigError naming the key and the fix."""
    check_limits(config)
    check_combinations(config)
