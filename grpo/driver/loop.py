"""The driver: one thread, one event loop, N rollout coroutines and one training coroutine.

    dataloader --prompt--> generator --completions--> reward ----.
        ^                     ^  `-------------------> reference --+--> group --> replay buffer --batch--> trainer
        |                     |                                                                               |
    N x continuous_rollouts   `-------- weights, version v + 1 -------- 1 x continuous_training --------------'

All heavy work happens in the actors behind `services`; the driver only awaits. Every group has a ticket from the
pacer. At most (S + 1) * P tickets are out at a time, which bounds how old a group is when it is trained on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from grpo.checkpoint.resume import ResumePoint
from grpo.config.schema import RunConfig
from grpo.driver.checkpoints import Checkpoints
from grpo.driver.context import RunContext
from grpo.driver.evaluation import Evaluation
from grpo.driver.prompts import PromptQueue
from grpo.driver.recorder import Recorder, TrainedStep
from grpo.driver.recovery import Recovery
from grpo.driver.rollout import rollout, sampling_params
from grpo.driver.watchdog import Watchdog
from grpo.driver.weight_sync import WeightSync
from grpo.errors import GroupError, PayloadLost, ZeroVarianceGroup
from grpo.services.handle import Services
from grpo.telemetry.activity import begin_activity
from grpo.telemetry.recording import span
from grpo.types import Ticket
from grpo.utils.aio import Interrupted, cancel_and_wait, gather_or_cancel, raise_first, run_until_set, task_name


async def train_loop(
    services: Services,
    config: RunConfig,
    recorder: Recorder,
    shutdown: asyncio.Event,
    resume: ResumePoint | None = None,
) -> None:
    """Train until step `trainer.max_steps`, or until `shutdown` is set; continue from `resume` if given.

    All tasks belong to one task group: the first error cancels the other tasks and is raised with its own type.
    `services` replaces actors that die; `Recovery` restores the state that only the driver knows.
    """
    prompts = PromptQueue(services.dataloader, recorder.pacer, config.trainer.groups_per_step, config.uses_difficulty)
    begin_activity("training")
    watchdog = Watchdog(config.watchdog, recorder.failures.progress, recorder.warn)
    try:
        async with asyncio.TaskGroup() as tasks:
            # These two stay alive during the last checkpoint: it may stall or fail as well.
            watching = [tasks.create_task(watch) for watch in (watchdog.watch(), recorder.failures.wait_fatal())]
            recording = recorder.watch(services.replica_stats, config.driver.slow_callback_ms)
            background = [tasks.create_task(recording, name="recorder")]
            weights = WeightSync(services, config, recorder.warn, tasks)
            run = RunContext(services, recorder.pacer, prompts, weights, config, recorder, shutdown)
            recovery = Recovery(run)
            evaluation, checkpoints = Evaluation(run, tasks), Checkpoints(run, recovery, tasks)
            if resume is not None:
                await checkpoints.restore(resume.path, resume.progress)

            # Rollouts start once every generator holds the trainer's weights.
            await weights.publish()
            recorder.training_begins(await weights.wait_loaded())
            for i in range(run.pacer.concurrency.most):
                background.append(tasks.create_task(continuous_rollouts(run, i), name=f"rollouts-{i}"))
            with suppress(Interrupted):
                await evaluation.run_if_due(recorder.step)
                await continuous_training(run, recovery, evaluation, checkpoints)

            await weights.wait_overlapped()
            evaluation.cancel()
            for task in background:
                task.cancel()
            await checkpoints.finish(recorder.step)
            await cancel_and_wait(watching)
    except BaseExceptionGroup as group:
        raise_first(group)
    finally:
        recorder.training_ended(services.replica_stats(), prompts.counts())


async def continuous_rollouts(run: RunContext, number: int) -> None:
    """Make one group after another.

    Consumes: tickets.
    Waits for: its turn, a ticket, then the services that make the group.
    Unblocked by: a higher concurrency limit; `finish_step` returning tickets; a dropped or lost group.
    Ends when: `shutdown` is set and its group is finished, or `train_loop` cancels it after the last step.
    """
    begin_activity("rollouts", track=task_name())
    while not run.shutdown.is_set():
        await run.pacer.concurrency.turn(number)
        ticket = await run.pacer.admit()
        try:
            with span("group", "group", ticket=ticket.serial):
                await make_group(ticket, run)
        except (GroupError, ZeroVarianceGroup) as error:
            await run.drop(ticket, error)
        except PayloadLost as error:
            run.requeue_lost(ticket, error)


async def make_group(ticket: Ticket, run: RunContext) -> None:
    """Roll out the ticket's prompt and add the finished group to the replay buffer."""
    prompt = await run.prompts.prompt_for(ticket)
    params = sampling_params(run.config.rollout, run.config.seed, prompt)
    finished = await rollout(prompt, params, run.services, run.config)
    run.prompts.record_rewards(prompt, finished.group.rewards)  # before `add`: a checkpoint has both, or neither
    await run.services.replay_buffer.add.call_one(ticket, finished.group)
    run.group_finished(ticket, finished)


async def continuous_training(
    run: RunContext, recovery: Recovery, evaluation: Evaluation, checkpoints: Checkpoints
) -> None:
    """Train on one batch after another. The new weights are loaded, and evaluated if due, during the next step.

    Consumes: batches of P groups from the replay buffer.
    Waits for: a batch; the train step; every generator to hold the previous version of the weights.
    Unblocked by: rollouts adding the P-th group in ticket order; generators acknowledging `update_weights`.
    Ends when: step `trainer.max_steps` is trained, or a shutdown interrupts the wait for a batch or an evaluation.
    """
    buffer, trainer, config = run.services.replay_buffer, run.services.trainer, run.config
    for step in range(run.recorder.step + 1, config.trainer.max_steps + 1):
        times = run.recorder.stopwatch()
        with times("time/trainer_wait_s"):
            batch, report = await run_until_set(run.shutdown, buffer.sample.call_one(config.trainer.groups_per_step))
        run.pacer.mark_training(report.tickets)
        with times("time/train_step_s", step=step, tickets=[ticket.serial for ticket in report.tickets]):
            metrics, *_ = await trainer.train_step.call(batch)
        with times("time/weight_sync_s"):
            publish = run.weights.publish(wait=evaluation.will_run(step))
            await gather_or_cancel(publish, recovery.step_trained(step, batch))
        del batch  # a reference keeps the batch in the object store
        run.pacer.concurrency.step_trained(times.seconds)
        finished = finish_step(TrainedStep(step, metrics, report, times), run, evaluation)
        await run.weights.overlap_with_next_step(finished)
        await checkpoints.save_if_due(step)


async def finish_step(trained: TrainedStep, run: RunContext, evaluation: Evaluation) -> None:
    """Return the step's tickets once every generator has loaded the new weights, and evaluate if due."""
    with trained.times("time/weight_load_s"):
        stats = await run.weights.wait_loaded()
    with run.recorder.metrics_line(trained, stats):
        run.pacer.release(trained.batch.tickets)  # not before: groups that start now sample from the new weights
        await evaluation.run_if_due(trained.number)
