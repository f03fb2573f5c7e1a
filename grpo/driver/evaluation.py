"""Evaluation on held-out prompts, by exactly one policy version at a time, beside training."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from grpo.config.schema import RunConfig
from grpo.driver.context import RunContext
from grpo.driver.rollout import ends_run, sample_group, sampling_params, scores_of
from grpo.driver.watchdog import Watchdog
from grpo.errors import GroupError, MixedVersionsError, PayloadLost
from grpo.services.handle import EvaluationServices
from grpo.telemetry.activity import begin_activity
from grpo.telemetry.recording import span, stop_recording
from grpo.types import Detail, EvaluationReport, GenerationReport, Prompt, SamplingParams, Scores
from grpo.utils.aio import Signal, gather_or_cancel, race, run_until_set

log = logging.getLogger(__name__)

_SEED = 1 << 20  # above every seed of training
_STILL_RUNS = (
    "the previous one is still running; raise eval.every, or speed it up with fewer eval.prompts or more eval.replicas"
)
_MAX_CONCURRENT = 2000  # prompts in flight: fewer than the calls that an actor accepts

Answer = tuple[Scores, GenerationReport]
OnAnswer = Callable[[Prompt, Scores | None], None]


class Evaluation:
    """Evaluates the policy at the start, every `eval.every` steps, and at the end.

    With an evaluator, the new weights are loaded into it and the evaluation runs as a task of `tasks` beside training.
    Without one, training waits while its own generators answer. Either way the weights don't change meanwhile.
    """

    def __init__(self, run: RunContext, tasks: asyncio.TaskGroup) -> None:
        services = run.services
        generator = services.evaluator or services.generator
        self._services = EvaluationServices(services.dataloader, generator, services.reward, services.environment)
        self._evaluator, self._weights, self._tasks = services.evaluator, run.weights, tasks
        self._config, self._recorder, self._shutdown = run.config, run.recorder, run.shutdown
        self._prompts: Sequence[Prompt] = ()
        self._running: asyncio.Task[None] | None = None

    async def run_if_due(self, step: int) -> None:
        """Evaluate the policy after `step`, whose weights the generators hold, if it is due.

        Waits until the evaluator has loaded the weights; at the last step, or without an evaluator, until the
        evaluation is finished. An evaluation that is due while another is running is skipped and counted, unless it is
        the last one. Raises Interrupted when `shutdown` is set first.
        """
        if not self._is_due(step):
            return
        if not self.will_run(step):
            self._recorder.evaluation_skipped(step, _STILL_RUNS)
            return
        last = step == self._config.trainer.max_steps
        with self._recorder.evaluation_wait():
            await run_until_set(self._shutdown, self._load())
            if self._evaluator is None or last:
                await run_until_set(self._shutdown, self._evaluate(step))
            else:
                self._recorder.history.evaluating = step
                self._running = self._tasks.create_task(self._evaluate_beside(step), name=f"evaluation-{step}")

    def cancel(self) -> None:
        """Cancel a running evaluation."""
        if self._running is not None:
            self._running.cancel()

    def will_run(self, step: int) -> bool:
        """Return True if an evaluation after `step` is due and will not be skipped."""
        last = step == self._config.trainer.max_steps
        return self._is_due(step) and (last or self._running is None or self._running.done())

    def _is_due(self, step: int) -> bool:
        if any(report.step == step for report in self._recorder.history.evaluations):
            return False  # evaluated before the run was resumed
        config, every = self._config, self._config.eval.every
        return config.eval.prompts > 0 and (step in (0, config.trainer.max_steps) or (every > 0 and step % every == 0))

    async def _load(self) -> None:
        """Load the weights into the evaluator once it is free, before the trainer overwrites their buffer."""
        if self._running is not None:
            await asyncio.wait([self._running])
        if self._evaluator is not None:
            await self._evaluator.update_weights.fanout(self._weights.stored())

    async def _evaluate_beside(self, step: int) -> None:
        """Evaluate as a task beside training.

        Consumes: the held-out prompts.
        Waits for: the evaluator's answers and their rewards.
        Unblocked by: the evaluator and the reward service; replicas that die are replaced.
        Ends when: every prompt is answered, or `cancel` is called.
        """
        begin_activity("evaluation")
        restarts = self._recorder.failures.restarts
        try:
            await self._evaluate(step)
        except MixedVersionsError as error:
            if self._recorder.failures.restarts == restarts:
                raise
            # An evaluator was replaced, its weights were lost, and only newer ones exist.
            self._recorder.evaluation_skipped(step, str(error))

    async def _evaluate(self, step: int) -> None:
        """Evaluate under a watchdog. Every answer counts as progress of training too, which may be waiting for it."""
        answered, progress = Signal(), self._recorder.failures.progress

        def on_answer(prompt: Prompt, scores: Scores | None) -> None:
            answered.notify()
            progress.notify()

        self._prompts = self._prompts or await held_out_prompts(self._services, self._config)
        work = evaluate(self._services, self._config, self._prompts, step, on_answer)
        watchdog = Watchdog(self._config.watchdog, answered, self._recorder.warn)
        self._recorder.evaluated(await race(work, watchdog.watch()))


async def held_out_prompts(services: EvaluationServices, config: RunConfig) -> list[Prompt]:
    """Return the first `eval.prompts` held-out prompts, the same at every call; fewer if the task has fewer."""
    prompts: list[Prompt] = await services.dataloader.held_out.call_one(config.eval.prompts)
    return prompts


async def evaluate(
    services: EvaluationServices,
    config: RunConfig,
    prompts: Sequence[Prompt],
    version: int,
    on_answer: OnAnswer = lambda prompt, scores: None,
    detail: Detail = "rewards",
) -> EvaluationReport:
    """Generate and score `eval.samples` completions of every prompt, all prompts concurrently.

    Seeds are the same at every call: two evaluations differ by the weights alone. `on_answer` is called for every
    prompt when it is done: with its scores in the given `detail`, or with None if its reward or environment failed and
    the prompt is left out (`on_error=drop`). Raises MixedVersionsError for a token of another policy version than
    `version`.
    """
    started = time.perf_counter()
    temperature = config.rollout.temperature if config.eval.temperature is None else config.eval.temperature
    rollout = dataclasses.replace(config.rollout, temperature=temperature)
    entry, slots = asyncio.Lock(), asyncio.Semaphore(_MAX_CONCURRENT)

    async def answer(prompt: Prompt) -> Answer | None:
        begin_activity("answers")
        stop_recording()  # hundreds of tracks would bury training in the timeline
        params = sampling_params(rollout, _SEED, prompt, n=config.eval.samples)
        async with slots:
            async with entry:  # one per turn of the event loop: starting hundreds of calls at once would block it
                await asyncio.sleep(0)
            try:
                scores, report = await _answer(prompt, params, services, detail, version)
            except GroupError as error:
                if ends_run(config, error):
                    raise
                log.warning("left a prompt out of the evaluation: %s", error)
                on_answer(prompt, None)
                return None
        on_answer(prompt, scores)
        return scores, report

    # All prompts are under way at once: the engine batches them, and the slowest answer sets the time.
    with span("evaluation", "stage", prompts=len(prompts)):
        answers = await gather_or_cancel(*map(answer, prompts))
    return summarize(answers, config, version, time.perf_counter() - started)


async def _answer(
    prompt: Prompt, params: SamplingParams, services: EvaluationServices, detail: Detail, version: int
) -> Answer:
    """Sample and score the completions of one prompt. Raises MixedVersionsError, and GroupError."""
    while True:
        try:
            sampled = await sample_group(prompt, params, services, detail)
            report = sampled.report
            if not report.oldest_version == report.newest_version == version:
                raise MixedVersionsError(
                    f"the evaluation of version {version} was answered by versions {report.oldest_version} to "
                    f"{report.newest_version}"
                )
            return await scores_of(sampled, services, detail), report
        except PayloadLost as error:
            log.warning("%s; generating the answer again", error)


def summarize(answers: Sequence[Answer | None], config: RunConfig, version: int, seconds: float) -> EvaluationReport:
    """Average over the prompts that were scored; NaN if there are none."""
    answered = [answer for answer in answers if answer is not None]
    rewards = [scores.rewards for scores, _ in answered]
    reports = [report for _, report in answered]
    means = [fmean(group) for group in rewards]
    solved = [sum(reward >= config.eval.success_threshold for reward in group) for group in rewards]
    samples = config.eval.samples
    return EvaluationReport(
        step=version,
        prompts=len(answered),
        prompts_left_out=len(answers) - len(answered),
        reward_mean=_mean(means),
        reward_stderr=stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan,
        pass_at={
            k: _mean([pass_at_k(samples, solved_count, k) for solved_count in solved])
            for k in (2**power for power in range(samples.bit_length()))
        },
        completion_count=sum(report.completion_count for report in reports),
        token_count=sum(report.token_count for report in reports),
        truncated_count=sum(report.truncated_count for report in reports),
        seconds=seconds,
    )


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Return the probability that k of `samples` completions, drawn without replacement, contain a solved one.

    The unbiased estimator of pass@k: Chen et al. 2021, arXiv:2107.03374, eq. 1.
    """
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
