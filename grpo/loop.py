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

from grpo.checkpointing import Checkpoints
from grpo.config import RunConfig
from grpo.evaluation import Evaluation
from grpo.observe.recorder import Recorder
from grpo.prompts import PromptQueue
from grpo.recovery import Recovery
from grpo.resume import ResumePoint
from grpo.rollout import rollout, sampling_params
from grpo.run import Run
from grpo.services import Services
from grpo.structured import Interrupted, raise_first, task_name, together, unless
from grpo.telemetry.recording import span
from grpo.types import GeneratorStats, PayloadLost, RewardError, Ticket, ZeroAdvantage
from grpo.waiting import begin_activity
from grpo.watchdog import Watchdog


async def run(
    services: Services,
    config: RunConfig,
    recorder: Recorder,
    shutdown: asyncio.Event,
    resume: ResumePoint | None = None,
) -> None:
    """Train for `trainer.max_steps` steps, or until `shutdown` is set, from the start or from where `resume` says.

    Every task belongs to one task group: the first error ends them all and is raised as it is. Actors that die are
    replaced behind `services`; what only the driver knows of them is in `Recovery`.
    """
    prompts = PromptQueue(services.dataloader, recorder.pacer, config.trainer.groups_per_step, config.uses_difficulty)
    shared = Run(services, recorder.pacer, prompts, config, recorder, shutdown)
    recovery = Recovery(shared)
    begin_activity("training")
    watchdog = Watchdog(config.watchdog, recorder.failures.progress, recorder.warn)
    try:
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(watch) for watch in (watchdog.watch(), recorder.failures.until_fatal())]
            background = [tasks.create_task(recorder.watch(config.driver.slow_callback_ms), name="recorder")]
            evaluation, checkpoints = Evaluation(shared, tasks), Checkpoints(shared, recovery, tasks)
            if resume is not None:
                await checkpoints.restore(resume.path, resume.progress)
            weights, stats = await publish_weights(services)
            recorder.training_begins(stats)
            for i in range(shared.pacer.concurrency.most):
                background.append(tasks.create_task(continuous_rollouts(shared, i), name=f"rollouts-{i}"))
            with suppress(Interrupted):
                await evaluation.after(recorder.step, weights)
                del weights  # they take up room in the object store for as long as they are held
                await continuous_training(shared, recovery, evaluation, checkpoints)
            evaluation.cancel()
            for task in background:
                task.cancel()
            await checkpoints.finish(recorder.step)
            for task in watching:
                task.cancel()
    except BaseExceptionGroup as group:
        raise_first(group)
    finally:
        recorder.prompts = prompts.counts()


async def continuous_rollouts(run: Run, number: int) -> None:
    """Make groups, one after another, until `shutdown` is set or the training ends and cancels it.

    Consumes tickets. Waits for its turn, for a ticket (woken when a step has been trained and published, or a group
    was lost or dropped), then for its group.
    """
    begin_activity("rollouts", track=task_name())
    while not run.shutdown.is_set():
        await run.pacer.concurrency.turn(number)
        ticket = await run.pacer.admit()
        try:
            with span("group", "group", ticket=ticket.serial):
                await make_group(ticket, run)
        except (RewardError, ZeroAdvantage) as error:
            await run.drop(ticket, error)
        except PayloadLost as error:
            run.lost(ticket, error)


async def make_group(ticket: Ticket, run: Run) -> None:
    """Consumes a prompt, leaves its group in the replay buffer. Waits for the generator, the reward, the reference."""
    prompt = await run.prompts.prompt_for(ticket)
    params = sampling_params(run.config.rollout, run.config.seed, prompt)
    finished = await rollout(prompt, params, run.services, run.config)
    run.prompts.learned(prompt, finished.group.rewards)  # first: who has the group must know of it too
    await run.services.replay_buffer.add.call_one(ticket, finished.group)
    run.group_finished(ticket, finished)


async def continuous_training(run: Run, recovery: Recovery, evaluation: Evaluation, checkpoints: Checkpoints) -> None:
    """Train on batch after batch, publish the weights, hand the tickets back; evaluate and keep what is due.

    Waits for a batch (woken when its P-th group is in the replay buffer), for the trainer, and for every generator to
    acknowledge the new weights: only then are tickets released, so new work is born fresh. A shutdown ends the wait for
    a batch or an evaluation with Interrupted, but lets a step that has begun finish.
    """
    services, pacer, config, recorder = run.services, run.pacer, run.config, run.recorder
    for step in range(recorder.step + 1, config.trainer.max_steps + 1):
        times = recorder.stopwatch()
        sample = services.replay_buffer.sample.call_one(config.trainer.groups_per_step)
        with times("time/trainer_wait_s"):
            batch, taken = await unless(run.shutdown, sample)
        pacer.are_training(taken.tickets)
        with times("time/train_step_s", step=step, tickets=[ticket.serial for ticket in taken.tickets]):
            metrics, *_ = await services.trainer.train_step.call(batch)
        with times("time/weight_sync_s"):  # the trainer's state is copied while the generators load
            (weights, stats), _ = await together(publish_weights(services), recovery.step_trained(step, batch))
        with recorder.metrics_line(step, metrics, taken, stats, times):
            pacer.release(taken.tickets)
            pacer.concurrency.step_trained(times.seconds)
            await evaluation.after(step, weights)
        del weights, batch
        await checkpoints.after(step)


async def publish_weights(services: Services) -> tuple[Any, list[GeneratorStats]]:
    """Bring the trainer's weights into every generator; returns once all of them have acknowledged the version.

    The weights are a reference to them, good until the next call: their buffer is written to again.
    """
    (weights, _), *_ = await services.trainer.push_weights.call()
    return weights, await services.generator.update_weights.fanout(weights)
