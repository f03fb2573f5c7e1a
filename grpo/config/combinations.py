"""Checks of settings that are valid one by one, but not together."""

from __future__ import annotations

from grpo.config.schema import RunConfig
from grpo.errors import ConfigError


def check_combinations(config: RunConfig) -> None:
    """Raise ConfigError with the key and the fix for settings that contradict each other."""
    for check in (
        _check_model,
        _check_task,
        _check_cluster,
        _check_updates,
        _check_correction,
        _check_shaping,
        _check_ranks,
        _check_gpus,
        _check_generator,
        _check_weight_sync,
        _check_evaluation,
    ):
        check(config)


def _check_model(config: RunConfig) -> None:
    if (config.model.path is None) == (config.model.builder is None):
        raise ConfigError("set either model.path (with model=hf) or model.builder", key="model.path")


def _check_task(config: RunConfig) -> None:
    if config.task.renderer is not None and config.task.template != "chat":
        raise ConfigError(
            f"is {config.task.renderer}, which needs task.template=chat; or set it to null", key="task.renderer"
        )


def _check_cluster(config: RunConfig) -> None:
    if config.cluster.dashboard and config.cluster.address is not None:
        raise ConfigError(
            "works only for a cluster that the run starts, but cluster.address joins one; leave it out",
            key="cluster.dashboard",
        )


def _check_updates(config: RunConfig) -> None:
    updates, groups = config.trainer.updates_per_batch, config.trainer.groups_per_step
    if updates > groups:
        raise ConfigError(
            f"is {updates}, but a batch has {groups} groups (trainer.groups_per_step), which are not split; lower it",
            key="trainer.updates_per_batch",
        )


def _check_correction(config: RunConfig) -> None:
    correction = config.correction
    if correction.mode == "none" and (correction.min_ratio, correction.max_ratio) != (0, None):
        raise ConfigError(
            "is none, so correction.min_ratio and max_ratio have no effect; take correction=tis, mis, icepop or "
            "decoupled",
            key="correction.mode",
        )


def _check_shaping(config: RunConfig) -> None:
    shaping = config.shaping
    low, high = shaping.clip_low, shaping.clip_high
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"is {low}, must be less than shaping.clip_high={high}", key="shaping.clip_low")
    if (shaping.overlong == "penalize") != (shaping.overlong_buffer > 0) or shaping.overlong_buffer > 1:
        raise ConfigError(
            f"is {shaping.overlong_buffer:g} with shaping.overlong={shaping.overlong}; penalize needs a fraction of "
            "rollout.max_completion_tokens, like 0.2, and keep and mask need 0",
            key="shaping.overlong_buffer",
        )
    if config.loss.advantages == "max_rl" and (shaping.length_penalty > 0 or shaping.overlong == "penalize"):
        raise ConfigError(
            "max_rl needs rewards of at least 0, and a length penalty makes them negative; choose another estimator, "
            "or no penalty",
            key="loss.advantages",
        )


def _check_ranks(config: RunConfig) -> None:
    ranks, num_cpus, num_gpus = config.trainer.ranks, config.trainer.num_cpus, config.trainer.num_gpus
    if ranks > 1 and num_gpus not in (0, 1):
        raise ConfigError(
            f"is {num_gpus:g}, but each of trainer.ranks={ranks} uses one whole GPU or none; set it to 1 or 0",
            key="trainer.num_gpus",
        )
    if ranks > 1 and num_cpus == num_gpus == 0:
        raise ConfigError(
            f"is 0, but trainer.ranks={ranks} are placed by their resources; reserve a part of a core, like 0.5",
            key="trainer.num_cpus",
        )


def _check_gpus(config: RunConfig) -> None:
    """Refuse several GPUs for one process, which only vLLM can use (see `_check_vllm`)."""
    if (num_gpus := config.trainer.num_gpus) > 1:
        raise ConfigError(
            f"is {num_gpus:g}, but each process of the trainer uses one GPU; set it to 1, and trainer.ranks to the "
            "number of GPUs",
            key="trainer.num_gpus",
        )
    actors = {"reference": config.reference.num_gpus}
    if config.generator.engine != "vllm":
        actors |= {"generator": config.generator.num_gpus, "eval": config.eval.num_gpus}
    for group, num_gpus in actors.items():
        if num_gpus > 1:
            raise ConfigError(
                f"is {num_gpus:g}, but each replica uses one GPU; set it to 1, and {group}.replicas to the "
                "number of GPUs",
                key=f"{group}.num_gpus",
            )


def _check_generator(config: RunConfig) -> None:
    generator, group_size = config.generator, config.rollout.group_size
    if generator.max_replicas is not None and generator.max_replicas < generator.replicas:
        raise ConfigError(
            f"is {generator.max_replicas}, must be at least generator.replicas={generator.replicas}; raise it or "
            "leave it out",
            key="generator.max_replicas",
        )
    if generator.max_sequences < group_size:
        raise ConfigError(
            f"is {generator.max_sequences}, but a group of rollout.group_size={group_size} is decoded together; raise "
            "it or lower rollout.group_size",
            key="generator.max_sequences",
        )
    if generator.tensor_parallel > 1 and generator.engine != "vllm":
        raise ConfigError(
            f"is {generator.tensor_parallel}, but only generator.engine=vllm shards a model; set it to 1",
            key="generator.tensor_parallel",
        )
    if generator.engine == "vllm":
        _check_vllm(config)


def _check_vllm(config: RunConfig) -> None:
    for group, temperature in (("rollout", config.rollout.temperature), ("eval", config.eval.temperature)):
        if temperature is not None and temperature > 2:
            raise ConfigError(f"is {temperature}, vLLM takes at most 2", key=f"{group}.temperature")
    # Evaluators have the same engine, so they need the same kind of GPUs.
    on_gpus, tensor_parallel = config.generator.num_gpus > 0, config.generator.tensor_parallel
    actors = {"generator": config.generator.num_gpus} | (
        {"eval": config.eval.num_gpus} if config.uses_evaluator else {}
    )
    for group, num_gpus in actors.items():
        fits = num_gpus == tensor_parallel or (tensor_parallel == 1 and 0 < num_gpus < 1)
        if not (fits if on_gpus else num_gpus == 0):
            needed = (tensor_parallel if tensor_parallel > 1 else "1, or a fraction") if on_gpus else "0"
            raise ConfigError(
                f"is {num_gpus:g}; with generator.num_gpus={config.generator.num_gpus:g} and "
                f"generator.tensor_parallel={tensor_parallel} it must be {needed}",
                key=f"{group}.num_gpus",
            )


def _check_weight_sync(config: RunConfig) -> None:
    key = "weight_sync.backend"
    if config.weight_sync.backend != "nccl":
        return
    if config.generator.engine != "torch":
        raise ConfigError(
            f"is nccl, but the {config.generator.engine} engine has no GPU in the actor's process; take auto or gloo",
            key=key,
        )
    for group, num_gpus in (("trainer", config.trainer.num_gpus), ("generator", config.generator.num_gpus)):
        if num_gpus < 1:
            raise ConfigError(
                f"nccl needs whole GPUs, and {group}.num_gpus is {num_gpus:g}; raise it, or take auto or gloo", key=key
            )
    if config.trainer.ranks > 1:
        # Two NCCL communicators in use at the same time can deadlock.
        raise ConfigError(
            f"nccl needs a trainer of one rank, and trainer.ranks={config.trainer.ranks} use it among themselves at "
            "the same time; take auto or gloo",
            key=key,
        )


def _check_evaluation(config: RunConfig) -> None:
    samples, temperature = config.eval.samples, config.eval.temperature
    if samples > 1 and (config.rollout.temperature if temperature is None else temperature) == 0:
        raise ConfigError(
            f"is {samples}, but at temperature 0 all completions of a prompt are equal; set it to 1, or "
            "eval.temperature above 0",
            key="eval.samples",
        )
    if samples > config.generator.max_sequences:
        raise ConfigError(
            f"is {samples}, but the completions of a prompt are decoded together and "
            f"generator.max_sequences={config.generator.max_sequences}; lower it or raise generator.max_sequences",
            key="eval.samples",
        )
