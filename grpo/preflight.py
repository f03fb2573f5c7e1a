"""Everything that can be found wrong before a cluster is started."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from grpo.actors.reward import reward_function
from grpo.algorithms.advantages import ADVANTAGES
from grpo.algorithms.losses import LOSSES
from grpo.cluster.plan import actor_specs, check_capacity
from grpo.config import ModelConfig, RunConfig
from grpo.engines.simulated import SimulatedEngine
from grpo.imports import check_arguments, import_target
from grpo.tasks.base import Task
from grpo.tasks.encoding import PromptEncoder, make_task
from grpo.types import ConfigError


def check_names(config: RunConfig) -> Task:
    """Look up everything that the config names; returns the task. Raises ConfigError or TaskError."""
    for key, name, known in (
        ("loss.name", config.loss.name, LOSSES),
        ("loss.advantages", config.loss.advantages, ADVANTAGES),
    ):
        if name not in known:
            raise ConfigError(f"{name!r} is not one of {', '.join(known)}", key=key)
    if config.generator.engine == "simulated":
        check_arguments(SimulatedEngine, config.generator.args, key="generator.args")
    elif config.generator.args:
        raise ConfigError(f"the {config.generator.engine} engine takes none", key="generator.args")
    if config.model.prepare is not None:
        check_arguments(import_target(config.model.prepare, key="model.prepare"), config.model.args, key="model.args")
    task = make_task(config.task)
    for name in config.reward.functions:
        reward_function(name, task)
    if len(task.problems("train")) == 0:
        raise ConfigError(f"{config.task.target} has no training problems; check task.args", key="task.target")
    return task


def check_resources(config: RunConfig) -> None:
    """On a cluster of our own, compare what the actors ask for with this machine. Raises LaunchError."""
    if config.cluster.address is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        check_capacity(actor_specs(config), cores, torch.cuda.device_count(), "this machine")


def prepare_model(config: RunConfig, task: Task) -> RunConfig:
    """The config with `model.path` set: made by `model.prepare` where the config names it."""
    if config.model.prepare is None:
        path = os.path.expanduser(str(config.model.path))
        return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
    prepare = import_target(config.model.prepare, key="model.prepare")
    folder = prepare(task, **config.model.args)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder), prepare=None))


def check_model(config: RunConfig, task: Task) -> None:
    """Raise unless the model can be found, a prompt fits into `rollout.max_prompt_tokens`, and a held-out one too."""
    encoder = PromptEncoder(_find(config.model), config.task, config.rollout.max_prompt_tokens)
    encoder.check_usable(task)
    if config.eval.prompts and all(encoder.encode(problem) is None for problem in task.problems("held_out")):
        raise ConfigError("the task has no held-out prompt that fits; set it to 0 to do without", key="eval.prompts")


def _find(config: ModelConfig) -> AutoTokenizer:
    path = os.path.expanduser(str(config.path))
    if path.startswith((".", "/", "~")) and not Path(path, "config.json").is_file():
        raise ConfigError(f"no model folder at {path!r} (it would hold a config.json)", key="model.path")
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"can't load {path!r} from the hub or this machine ({first_line}); name a folder or a reachable model",
            key="model.path",
        ) from error
