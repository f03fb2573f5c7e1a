"""The actors that a run needs and the resources of each, for the launch, the checks and the dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.actors.checkpointer import Checkpointer
from grpo.actors.dataloader import Dataloader
from grpo.actors.environment import EnvironmentHost
from grpo.actors.generator import Generator
from grpo.actors.reference import Reference
from grpo.actors.replay_buffer import ReplayBuffer
from grpo.actors.reward import Reward
from grpo.actors.trainer import Trainer
from grpo.config.actors import EvalConfig, GeneratorConfig, ReferenceConfig, TrainerConfig
from grpo.config.schema import RunConfig
from grpo.utils.torch_utils import device_for


@dataclass(frozen=True, eq=False)
class ActorSpec:
    """One actor: its class and arguments, the number of its processes, and the resources of each process.

    `optional_replicas` are started in addition to `replicas`, as soon as the cluster has room for them. Actors with
    little work run `on_driver_node`, so that they are not lost with another node. Each of several `ranks` is
    constructed with its `rank`.

    Example:
        specs = {spec.name: spec for spec in actor_specs(config)}
        generator = specs["generator"]
        local = generator.cls(**generator.kwargs)       # the same object that a generator process holds
    """

    name: str
    cls: type
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    optional_replicas: int = 0
    on_driver_node: bool = False
    ranks: int = 1

    @property
    def config_group(self) -> str:
        """The group of settings with this actor's resources."""
        return "eval" if self.name == "evaluator" else self.name

    @property
    def processes(self) -> int:
        """The number of required processes."""
        return self.replicas * self.ranks

    @property
    def counted_by(self) -> str:
        """The setting in `config_group` that determines the number of processes."""
        return "ranks" if self.ranks > 1 else "replicas"


def actor_specs(config: RunConfig) -> list[ActorSpec]:
    """Return the actors of a training run, in the order of the dataflow; the optional ones only if they are used."""
    specs = evaluation_specs(config)
    if config.uses_reference:
        specs.append(_compute("reference", Reference, config, config.reference, config.reference.replicas))
    if config.uses_evaluator:
        specs.append(_compute("evaluator", Generator, config, config.eval, config.eval.replicas))
    if config.uses_checkpointer:
        kwargs = {"config": config, "folder": str(config.checkpoint.dir)}
        specs.append(ActorSpec("checkpointer", Checkpointer, kwargs, on_driver_node=True))
    return [
        *specs,
        ActorSpec("replay_buffer", ReplayBuffer, {"window": config.buffer.reorder_window}, on_driver_node=True),
        replace(_compute("trainer", Trainer, config, config.trainer, 1), ranks=config.trainer.ranks),
    ]


def evaluation_specs(config: RunConfig) -> list[ActorSpec]:
    """Return the actors that an evaluation needs: for prompts, completions and scores."""
    common = {"config": config}
    generator = _compute("generator", Generator, config, config.generator, config.generator.replicas)
    most = config.generator.max_replicas or config.generator.replicas
    return [
        ActorSpec("dataloader", Dataloader, common, on_driver_node=True),
        replace(generator, optional_replicas=most - config.generator.replicas),
        _scoring(config),
    ]


def _scoring(config: RunConfig) -> ActorSpec:
    """Specify the actor that scores: the environment that episodes are played in, else the reward."""
    if config.uses_environment:
        environment = config.environment
        kwargs = {"config": config}
        return ActorSpec("environment", EnvironmentHost, kwargs, environment.replicas, environment.num_cpus)
    return ActorSpec("reward", Reward, {"config": config}, config.reward.replicas, config.reward.num_cpus)


def _compute(
    name: str,
    cls: type,
    config: RunConfig,
    resources: EvalConfig | GeneratorConfig | ReferenceConfig | TrainerConfig,
    replicas: int,
) -> ActorSpec:
    """Specify an actor that runs a model: on its GPUs, or on the CPU with as many threads as it has CPUs."""
    kwargs = {
        "config": config,
        "device": device_for(resources.num_gpus),
        "threads": resources.threads or max(1, int(resources.num_cpus)),
    }
    return ActorSpec(name, cls, kwargs, replicas, resources.num_cpus, resources.num_gpus)
