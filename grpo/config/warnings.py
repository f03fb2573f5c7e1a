"""Warnings about settings that work, but probably not as intended."""

from __future__ import annotations

from collections.abc import Iterator

from grpo.config.algorithm import EnvironmentConfig
from grpo.config.schema import RunConfig


def warnings(config: RunConfig) -> list[str]:
    """Return one line per warning, starting with the key."""
    parts = (_about_rollouts, _about_rewards, _about_the_loss, _about_resources, _about_evaluation, _about_episodes)
    return [line for part in parts for line in part(config)]


def _about_rollouts(config: RunConfig) -> Iterator[str]:
    if config.most_rollouts > config.ticket_capacity:
        yield (
            f"rollout.concurrency={config.rollout.concurrency}: only {config.ticket_capacity} rollouts can ever run, "
            f"(max_policy_age {config.buffer.max_policy_age} + 1) x {config.trainer.groups_per_step} groups_per_step "
            "tickets; raise buffer.max_policy_age or lower the concurrency"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        yield (
            "rollout.top_p and top_k truncate the sampling distribution, but not the trainer's: "
            "importance ratios are biased; train with top_p=1 and top_k=0"
        )
    if config.rollout.temperature == 0:
        yield "rollout.temperature=0: all completions of a group are equal, so every group has zero variance; raise it"


def _about_rewards(config: RunConfig) -> Iterator[str]:
    if config.shaping.length_penalty > 0 and config.filter.zero_variance:
        yield (
            "filter.zero_variance: with shaping.length_penalty above 0 the rewards of a group differ by length, so "
            "groups that are all right or all wrong are hardly ever dropped"
        )
    if "math_verify" in config.reward.functions and config.reward.on_error == "fail":
        yield (
            "reward.functions: math_verify hangs on a few completions, and one of them ends the run after "
            "reward.timeout_s; reward.on_error=drop drops its group instead"
        )


def _about_the_loss(config: RunConfig) -> Iterator[str]:
    if config.uses_adapters and config.lora.dropout > 0:
        yield (
            f"lora.dropout={config.lora.dropout:g}: the trainer computes another distribution than was sampled from, "
            "so importance ratios are noisy; 0 is usual"
        )
    if config.loss.kl_estimator == "k1" and config.loss.beta > 0:
        yield (
            "loss.kl_estimator=k1: its gradient has mean zero on samples of the policy, so it keeps nothing near the "
            "reference; take k2 or k3"
        )
    aggregation = config.loss.aggregation or ("fixed_horizon" if config.loss.name == "dr_grpo" else None)
    if aggregation == "fixed_horizon" and config.loss.horizon is None:
        yield (
            "loss.horizon: without it fixed_horizon divides by the longest completion of each batch, so a token's "
            "weight varies between batches; set it to rollout.max_completion_tokens, as loss=dr_grpo does"
        )


def _about_resources(config: RunConfig) -> Iterator[str]:
    groups_per_update = config.trainer.groups_per_step // config.trainer.updates_per_batch
    if config.trainer.ranks > groups_per_update:
        yield (
            f"trainer.ranks={config.trainer.ranks}: an update has {groups_per_update} groups (trainer.groups_per_step, "
            "updates_per_batch), which are not split between ranks, so some ranks stay idle"
        )
    on_cpus = {
        "reference": config.uses_reference and config.reference.num_gpus == 0,
        "eval": config.uses_evaluator and config.generator.engine != "vllm" and config.eval.num_gpus == 0,
    }
    for group, slow in on_cpus.items():
        if slow and config.trainer.num_gpus > 0:
            yield (
                f"{group}.num_gpus=0: it computes on CPUs while the trainer has GPUs, far slower; give it one, or a "
                "fraction of one"
            )


def _about_evaluation(config: RunConfig) -> Iterator[str]:
    if config.eval.every > 0 and config.eval.prompts == 0:
        yield f"eval.every={config.eval.every}: nothing is evaluated, because eval.prompts is 0"
    elif config.eval.every >= config.trainer.max_steps:
        yield (
            f"eval.every={config.eval.every}: there are {config.trainer.max_steps} steps (trainer.max_steps), so only "
            "the start and the end are evaluated"
        )


def _about_episodes(config: RunConfig) -> Iterator[str]:
    if config.environment != EnvironmentConfig() and not config.uses_environment:
        yield (
            f"environment: its settings have no effect, since {config.task.target} has no environment and "
            "environment.tools is empty"
        )
