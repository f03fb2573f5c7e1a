"""The driver: one thread, one event loop, N rollout coroutines and one training coroutine.

    dataloader --prompt--> generator --completions--> reward ----.
        ^                     ^  `-------------------> reference --+--> group --> replay buffer --batch--> trainer
        |                     |                                                                               |
    N x continuous_rollouts   `-------- weights, version v + 1 -------- 1 x continuous_training --------------'

All heavy work happens in the actors behind `services`; the driver only awaits. A ticket from the pacer goes with
every group: at most (S + 1) * P are out, which bounds how old a group can be when it is trained on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from grpo.config import RunConfig
from grpo.evaluation import Evaluation
from grpo.observe.recorder import Recorder
from grpo.pacing import Pacer
from grpo.rollout import PromptQueue, rollout, sampling_params
from grpo.services import Services
from grpo.structured import Interrupted, first_error, unless, watchdog
from grpo.types import GeneratorStats, RewardError


async def run(services: Services, pacer: Pacer, config: RunConfig, recorder: Recorder, shutdown: asyncio.Event) -> None:
    """Train for `trainer.max_steps` steps, or until `shutdown` is set.

    Every task belongs to one task group: the first error ends them all and is raised as it is.
    """
    prompts = PromptQueue(services.dataloader, bulk=config.trainer.groups_per_step)
    async with watchdog(config.watchdog.seconds, "the first publication of weights"):
        weights, stats = await publish_weights(services)
    recorder.training_begins(stats)
    try:
        async with asyncio.TaskGroup() as tasks:
            evaluation = Evaluation(services, config, recorder, tasks, shutdown)
            background = [tasks.create_task(recorder.loop_lag.watch(), name="loop-lag")]
            for i in range(config.rollout.concurrency):
                rollouts = continuous_rollouts(services, pacer, prompts, config, recorder, shutdown)
                background.append(tasks.create_task(rollouts, name=f"rollouts-{i}"))
            with suppress(Interrupted):
                await evaluation.after(0, weights)
                del weights  # they take up room in the object store for as long as they are held
                await continuous_training(services, pacer, evaluation, config, recorder, shutdown)
            evaluation.cancel()
            for task in background:
                task.cancel()
    except BaseExceptionGroup as group:
        first = first_error(group)
        raise first from first.__cause__  # an error from another process has its traceback there


async def continuous_rollouts(
    services: Services,
    pacer: Pacer,
    prompts: PromptQueue,
    config: RunConfig,
    recorder: Recorder,
    shutdown: asyncio.Event,
) -> None:
    """Make groups, one after another, until `shutdown` is set or the training ends and cancels it.

    Consumes tickets and prompts, leaves groups in the replay buffer. Waits for a ticket (woken when a step has been
    trained and published), then for the generator, the reward and the reference.
    """
    while not shutdown.is_set():
        ticket = await pacer.admit()
        prompt = await prompts.next()
        params = sampling_params(config.rollout, config.seed, prompt)
        try:
            group, scores, report = await rollout(prompt, params, services, config.loss)
        except RewardError as error:
            if config.reward.on_error == "fail":
                raise
            recorder.group_dropped(error)
            await services.replay_buffer.skip.call_one(ticket)
            pacer.drop(ticket, error.reason)
            continue
        recorder.group_finished(group, scores, report)
        await services.replay_buffer.add.call_one(ticket, group)


async def continuous_training(
    services: Services,
    pacer: Pacer,
    evaluation: Evaluation,
    config: RunConfig,
    recorder: Recorder,
    shutdown: asyncio.Event,
) -> None:
    """Train on batch after batch, publish the weights, hand the tickets back, evaluate where it is due.

    Consumes batches of P groups. Waits for the replay buffer (woken when the P-th group is there), for the trainer,
    and for every generator to acknowledge the new weights: only then are tickets released, so new work is born fresh.
    A shutdown ends the wait for a batch or an evaluation with Interrupted, but lets a step that has begun finish.
    """
    for step in range(1, config.trainer.max_steps + 1):
        async with watchdog(config.watchdog.seconds, f"step {step}"):
            times = recorder.stopwatch()
            sample = services.replay_buffer.sample.call_one(config.trainer.groups_per_step)
            with times("time/trainer_wait_s"):
                batch, taken = await unless(shutdown, sample)
            with times("time/train_step_s"):
                metrics, *_ = await services.trainer.train_step.call(batch)
            with times("time/weight_sync_s"):
                weights, stats = await publish_weights(services)
        pacer.release(taken.tickets)
        with recorder.metrics_line(step, metrics, taken, stats, times):
            await evaluation.after(step, weights)
        del weights


async def publish_weights(services: Services) -> tuple[Any, list[GeneratorStats]]:
    """Bring the trainer's weights into every generator; returns once all of them have acknowledged the version.

    The weights are a reference to them, good until the next call: their buffer is written to again.
    """
    (weights, _version), *_ = await services.trainer.push_weights.call()
    return weights, await services.generator.update_weights.fanout(weights)
