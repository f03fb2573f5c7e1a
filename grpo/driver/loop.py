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
from grpo.errors import PayloadLost, RewardError, ZeroVarianceGroup
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
    """Train for `trainer.max_steps` steps, or until `shutdown` is set, from the start or from where `resume` says.

    Every task belongs to one task group: the first error ends them all and is raised as it is. Actors that die are
    replaced behind `services`; what only the driver knows of them is in `Recovery`.
    """
    prompts = PromptQueue(services.dataloader, recorder.pacer, config.trainer.groups_per_step, config.uses_difficulty)
    begin_activity("training")
    watchdog = Watchdog(config.watchdog, recorder.failures.progress, recorder.warn)
    try:
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(watch) for watch in (watchdog.watch(), recorder.failures.wait_fatal())]
            background = [tasks.create_task(recorder.watch(config.driver.slow_callback_ms), name="recorder")]
            weights = WeightSync(services, config, recorder.warn, tasks)
            shared = RunContext(services, recorder.pacer, prompts, weights, config, recorder, shutdown)
            recovery = Recovery(shared)
            evaluation, checkpoints = Evaluation(shared, tasks), Checkpoints(shared, recovery, tasks)
            if resume is not None:
                await checkpoints.restore(resume.path, resume.progress)
            await weights.publish()
            recorder.training_begins(await weights.wait_loaded())
            for i in range(shared.pacer.concurrency.most):
                background.append(tasks.create_task(continuous_rollouts(shared, i), name=f"rollouts-{i}"))
            with suppress(Interrupted):
                await evaluation.after(recorder.step)
                await continuous_training(shared, recovery, evaluation, checkpoints)
            await weights.done()
            evaluation.cancel()
            for task in background:
                task.cancel()
            await checkpoints.finish(recorder.step)
            await cancel_and_wait(watching)
    except BaseExceptionGroup as group:
        raise_first(group)
    finally:
        recorder.prompts = prompts.counts()


async def continuous_rollouts(run: RunContext, number: int) -> None:
    """Make groups, one after another, until `shutdown` is set or the training ends and cancels it.

    Consumes tickets. Waits for its turn, for a ticket (woken when new weights are in use, or a group was lost or
    dropped), then for its group.
    """
    begin_activity("rollouts", track=task_name())
    while not run.shutdown.is_set():
        await run.pacer.concurrency.turn(number)
        ticket = await run.pacer.admit()
        try:
            with span("group", "group", ticket=ticket.serial):
                await make_group(ticket, run)
        except (RewardError, ZeroVarianceGroup) as error:
            await run.drop(ticket, error)
        except PayloadLost as error:
            run.lost(ticket, error)


async def make_group(ticket: Ticket, run: RunContext) -> None:
    """Consumes a prompt, leaves its group in the replay buffer. Waits for the generator, the reward, the reference."""
    prompt = await run.prompts.prompt_for(ticket)
    params = sampling_params(run.config.rollout, run.config.seed, prompt)
    finished = await rollout(prompt, params, run.services, run.config)
    run.prompts.learned(prompt, finished.group.rewards)  # first: who has the group must know of it too
    await run.services.replay_buffer.add.call_one(ticket, finished.group)
    run.group_finished(ticket, finished)


async def continuous_training(
    run: RunContext, recovery: Recovery, evaluation: Evaluation, checkpoints: Checkpoints
) -> None:
    """Train on batch after batch; publish the weights beside the next step, evaluate and keep what is due.

    Waits for a batch (woken when its P-th group is in the replay buffer), for the trainer, and until the weights before
    are in use. A shutdown ends the wait for a batch or an evaluation with Interrupted, but lets a step finish.
    """
    buffer, trainer, config = run.services.replay_buffer, run.services.trainer, run.config
    for step in range(run.recorder.step + 1, config.trainer.max_steps + 1):
        times = run.recorder.stopwatch()
        with times("time/trainer_wait_s"):
            batch, taken = await run_until_set(run.shutdown, buffer.sample.call_one(config.trainer.groups_per_step))
        run.pacer.are_training(taken.tickets)
        with times("time/train_step_s", step=step, tickets=[ticket.serial for ticket in taken.tickets]):
            metrics, *_ = await trainer.train_step.call(batch)
        with times("time/weight_sync_s"):
            await gather_or_cancel(
                run.weights.publish(wait=evaluation.holds_up(step)), recovery.step_trained(step, batch)
            )
        del batch  # it takes up room in the object store for as long as it is held
        run.pacer.concurrency.step_trained(times.seconds)
        finished = finish_step(TrainedStep(step, metrics, taken, times), run, evaluation)
        await run.weights.beside_next_step(finished)
        await checkpoints.after(step)


async def finish_step(trained: TrainedStep, run: RunContext, evaluation: Evaluation) -> None:
    """Bring the new weights into use and hand the step's tickets back; evaluate if that is due.

    Waits for every generator to acknowledge the weights: only then are tickets released, so new work is born fresh.
    """
    with trained.times("time/weight_load_s"):
        stats = await run.weights.wait_loaded()
    with run.recorder.metrics_line(trained, stats):
        run.pacer.release(trained.batch.tickets)
        await evaluation.after(trained.number)
