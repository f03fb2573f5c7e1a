"""Checks that find mistakes before Ray starts, and the folder and the config that the actors get."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from grpo.actors.specs import ActorSpec, actor_specs
from grpo.checkpoint.resume import ResumePoint, archive_newer_checkpoints, check_compatible, is_completed
from grpo.checkpoint.store import checkpoints
from grpo.cluster.connect import check_dashboard, wait_for_room
from grpo.cluster.placement import Node, check_placement
from grpo.config.actors import LoraConfig, ModelConfig
from grpo.config.algorithm import RewardConfig
from grpo.config.composition import to_yaml
from grpo.config.schema import RunConfig
from grpo.driver.rollout import advantage_function
from grpo.engines.simulated import SimulatedEngine
from grpo.engines.vllm.params import check_installed
from grpo.environments.calls import UserCalls
from grpo.errors import ConfigError
from grpo.learner.objective import Objective
from grpo.models.loading import check_architecture, check_weights, context_length, load_settings, load_skeleton
from grpo.models.lora import ADAPTER_CONFIG, adapted_base, check_peft, check_targets
from grpo.models.tokenizer import load_tokenizer, stop_token_ids_of
from grpo.observe.run_dir import RunDirectory
from grpo.observe.sinks.fanout import check_sinks
from grpo.tasks.base import PromptEncoder, Task, environment_maker, make_renderer, make_task
from grpo.tasks.scoring import reward_function
from grpo.utils.imports import check_arguments, import_target
from grpo.utils.torch_utils import gpus_here

T = TypeVar("T")


def check(config: RunConfig, specs: Sequence[ActorSpec], warn: Callable[[str], None]) -> Task:
    """Check everything that needs no model folder to be built, and return the task.

    A dry run checks an existing model too. `warn` gets a line when the run has to wait for the cluster that it joins.
    """
    check_resources(config, specs, warn)
    task = check_names(config)
    if config.dry_run and config.model.builder is None:
        check_model(config, task)
        check_runnable(config)
    return task


def open_run(
    config: RunConfig, task: Task, folder: Path, resume: ResumePoint | None = None
) -> tuple[RunConfig, RunDirectory]:
    """Build and check the model, and open the run's folder. Returns the config that the actors get, and the folder.

    Raises ConfigError when the folder holds another run, or when settings differ from the run that is resumed.
    """
    run_dir = RunDirectory(folder)
    try:
        config = _fit_to_run(config, task, folder, resume)
        if resume is not None and resume.in_place:
            archive_newer_checkpoints(resume)
            run_dir.cut(resume.progress["files"])
        else:
            # With resume=auto, an unfinished run without a checkpoint starts over in its own folder.
            if config.resume != "auto" or is_completed(folder):
                run_dir.refuse_old_runs()
            run_dir.cut({})
    except BaseException:
        run_dir.close()
        raise
    run_dir.write("config.yaml", to_yaml(config))
    if config.checkpoint.every:
        run_dir.link_checkpoints(Path(str(config.checkpoint.dir)))
    return config, run_dir


def _fit_to_run(config: RunConfig, task: Task, folder: Path, resume: ResumePoint | None) -> RunConfig:
    config = prepare_model(config, task)
    kept = Path(config.checkpoint.dir or folder / "checkpoints").expanduser().absolute()
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, dir=str(kept)))
    check_model(config, task)
    if resume is not None:
        check_compatible(config, resume)
    elif config.checkpoint.every and kept != folder.absolute() / "checkpoints" and checkpoints(kept):
        raise ConfigError(
            f"{kept} holds another run's checkpoints, which this run would displace. Name another folder, "
            "or set resume=auto to continue that run",
            key="checkpoint.dir",
        )
    return config


def check_names(config: RunConfig) -> Task:
    """Look up every function, class and package that the config names. Returns the task.

    Raises ConfigError or TaskError.
    """
    Objective(config.loss, config.correction)
    advantage_function(config.loss)
    check_sinks(config.observe.sinks)
    check_dashboard(config.cluster)
    check_peft(config.lora)
    if config.generator.engine == "simulated":
        check_arguments(SimulatedEngine, config.generator.args, key="generator.args")
    elif config.generator.engine == "vllm":
        check_installed()
    elif config.generator.args:
        raise ConfigError(f"the {config.generator.engine} engine takes none", key="generator.args")
    if config.model.builder is not None:
        check_arguments(import_target(config.model.builder, key="model.builder"), config.model.args, key="model.args")
    task = make_task(config.task)
    if config.uses_environment:
        if config.reward.functions != RewardConfig().functions:
            raise ConfigError(
                f"is {config.reward.functions}, but an environment scores its episodes itself; leave it out",
                key="reward.functions",
            )
        environment_maker(task, config.task, config.environment.tools, UserCalls(threads=1))
    else:
        for name in config.reward.functions:
            reward_function(name, task)
    if len(task.problems("train")) == 0:
        raise ConfigError(f"{config.task.target} has no training problems; check task.args", key="task.target")
    return task


def check_resources(config: RunConfig, specs: Sequence[ActorSpec], warn: Callable[[str], None]) -> None:
    """Raise LaunchError unless the actors fit on this machine, or on the cluster that the run joins.

    A dry run does not look at a cluster, so that it can be made where the cluster can't be reached.
    """
    cluster = config.cluster
    if cluster.address is not None:
        if not config.dry_run:
            wait_for_room(specs, cluster.address, cluster.wait_for_nodes_s, warn)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        check_placement(specs, [Node(cores, gpus_here())], "this machine")


def prepare_model(config: RunConfig, task: Task) -> RunConfig:
    """Return the config that the actors get: `model.path` is a folder, and prompts fit into the model's context.

    `model.builder` builds the folder where the config names one. Adapters are merged into their base model, once, in a
    cached folder. Paths become absolute, since actors start in other folders.
    """
    if config.model.builder is None:
        path = os.path.expanduser(str(config.model.path))
        path = os.path.abspath(path) if path.startswith(".") or os.path.isdir(path) else path
    else:
        prepare = import_target(config.model.builder, key="model.builder")
        path = str(prepare(task, **config.model.args))
    model = dataclasses.replace(config.model, path=path, builder=None)
    if adapted_base(model) is not None:
        model = dataclasses.replace(model, path=_merged(model))
    file = config.task.path and os.path.abspath(os.path.expanduser(config.task.path))
    return _within_context(dataclasses.replace(config, model=model, task=dataclasses.replace(config.task, path=file)))


def check_model(config: RunConfig, task: Task) -> None:
    """Raise ConfigError or TaskError unless the model exists and prompts of both splits fit into its context."""
    config = prepare_model(config, task)
    check_weights(config.model)
    tokenizer = _found(load_tokenizer, config.model)
    if config.uses_environment:
        renderer = make_renderer(tokenizer, config.task, stop_token_ids_of(config.model, tokenizer))
        renderer.check_continues(tools=bool(config.environment.tools))
    encoder = PromptEncoder(tokenizer, config.task, config.rollout.max_prompt_tokens)
    encoder.check_usable(task)
    if config.eval.prompts and all(encoder.encode(problem) is None for problem in task.problems("held_out")):
        raise ConfigError(
            "the task has no held-out prompt that fits; set it to 0 to train without evaluation", key="eval.prompts"
        )


def check_runnable(config: RunConfig) -> None:
    """Raise ConfigError unless the model can be trained and run.

    This imports the model's code, which takes as long as all other checks together; it is done while Ray starts.
    """
    skeleton = _found(load_skeleton, config.model)
    check_architecture(skeleton, config.generator.engine)
    if config.uses_adapters:
        check_targets(skeleton, config.lora)


def _merged(model: ModelConfig) -> str:
    """Return the folder of the base model with the adapters of `model` merged into it."""
    from grpo.models.export import merged_model_path  # a second of imports that few runs need

    check_peft(LoraConfig(rank=1))
    try:
        return merged_model_path(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"can't merge the adapters at {str(model.path)!r} into their base: {' '.join(str(error).split())}; "
            f"{ADAPTER_CONFIG} there names the base",
            key="model.path",
        ) from error


def _within_context(config: RunConfig) -> RunConfig:
    """Limit `rollout.max_prompt_tokens` to the room that completions leave in the model's context."""
    context, rollout = context_length(_found(load_settings, config.model)), config.rollout
    if context is None:
        return config
    if rollout.max_completion_tokens >= context:
        raise ConfigError(
            f"is {rollout.max_completion_tokens}, which leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower it",
            key="rollout.max_completion_tokens",
        )
    room = min(rollout.max_prompt_tokens, context - rollout.max_completion_tokens)
    return dataclasses.replace(config, rollout=dataclasses.replace(rollout, max_prompt_tokens=room))


def _found(load: Callable[[ModelConfig], T], config: ModelConfig) -> T:
    """Call `load(config)`, and turn its errors into one line that names the key."""
    path = str(config.path)
    if path.startswith("/") and not Path(path, "config.json").is_file():
        raise ConfigError(f"no model folder at {path!r} (it would hold a config.json)", key="model.path")
    try:
        return load(config)
    except (OSError, ValueError) as error:
        if not config.trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                f"{path!r} brings code of its own; set it to true if you trust it", key="model.trust_remote_code"
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"can't load {path!r} from the hub or this machine ({first_line}); name a folder or a reachable model",
            key="model.path",
        ) from error


def print_plan(config: RunConfig, console: Console) -> None:
    """Print the actors that the run would start, and how far its rollouts may run ahead of the trainer."""
    console.print(plan_table(actor_specs(config)))
    running = min(config.most_rollouts, config.ticket_capacity)
    batch = config.trainer.groups_per_step
    console.print(
        f"rollouts        {config.rollout.concurrency} coroutines, {running} of them can run at once\n"
        f"tickets         {config.ticket_capacity} = (max_policy_age {config.buffer.max_policy_age} + 1) x "
        f"{batch} groups per step\n"
        f"staleness       at most {config.age_bound} versions\n"
        f"train step      {batch} groups x {config.rollout.group_size} completions"
        f"{f', shared by {config.trainer.ranks} ranks' if config.trainer.ranks > 1 else ''}\n"
        f"steps           {config.trainer.max_steps}",
        highlight=False,
    )
    if config.uses_adapters:
        console.print(f"trained         adapters of rank {config.lora.rank}; the base is frozen", highlight=False)
    if config.uses_adapters and config.loss.beta > 0:
        console.print("reference       the trainer's model with its adapters off", highlight=False)


def plan_table(specs: Sequence[ActorSpec]) -> Table:
    """Return a table with one row per actor: its processes and what each of them reserves."""
    table = Table("actor", "processes", "CPUs each", "GPUs each", title="plan", title_justify="left")
    for spec in specs:
        table.add_row(spec.name, str(spec.processes), f"{spec.num_cpus:g}", f"{spec.num_gpus:g}")
    return table
