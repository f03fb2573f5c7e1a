"""Evaluates a model as it stands: from a composed config to a table, without a trainer."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from grpo.actors.specs import evaluation_specs
from grpo.cli import preflight
from grpo.cli.lifecycle import Interrupts, outcome_of_run, ray_beside
from grpo.cluster.launch import launch_actors
from grpo.config.schema import RunConfig
from grpo.driver.evaluation import evaluate, held_out_prompts
from grpo.driver.watchdog import Watchdog
from grpo.errors import ConfigError
from grpo.observe.run_dir import RunDirectory, turns_record
from grpo.observe.terminal.display import AnswerProgress, evaluation_table
from grpo.observe.terminal.output import PipeSafeConsole, redirect_output
from grpo.services.failures import Failures
from grpo.services.handle import EvaluationServices
from grpo.telemetry.activity import begin_activity
from grpo.types import EXIT_CODES, EvaluationReport, Prompt, Scores
from grpo.utils.aio import race, run_until_set
from grpo.utils.gc_tuning import restore_gc

_VERSION = 0  # of the weights that a generator loads when it starts


def evaluate_model(config: RunConfig, folder: Path) -> int:
    """Answer the held-out prompts, print a table, and return the exit code.

    Leaves `evaluation.json` and, a line for every prompt, `completions.jsonl`; after an interruption only the latter.
    Raises GRPOError for what is wrong before the cluster is started.
    """
    if config.eval.prompts == 0:
        raise ConfigError("must be > 0 (number of held-out prompts)", key="eval.prompts")
    console = PipeSafeConsole(soft_wrap=True, highlight=False)
    task = preflight.check(config, evaluation_specs(config), partial(console.print, markup=False))
    if config.dry_run:
        PipeSafeConsole().print(preflight.plan_table(evaluation_specs(config)))
        return EXIT_CODES["completed"]
    config, run_dir = preflight.open_run(config, task, folder)
    try:
        return _evaluate_model(config, run_dir)
    finally:
        run_dir.close()


def _evaluate_model(config: RunConfig, run_dir: RunDirectory) -> int:
    with redirect_output(run_dir.path / "run.log") as console:
        console.print("starting Ray and the actors ...", style="dim")
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        check = partial(preflight.check_runnable, config)
        with outcome_of_run() as outcome, ray_beside(check, config.cluster, say):
            asyncio.run(_run(config, run_dir, console))
    if outcome.error is not None:
        message = f"error: {type(outcome.error).__name__}: {outcome.error}"
        PipeSafeConsole(stderr=True, soft_wrap=True, highlight=False).print(message, markup=False)
    console = PipeSafeConsole(soft_wrap=True, highlight=False)
    console.print(f"{outcome.status}; run folder: {run_dir.path}", markup=False)
    return EXIT_CODES[outcome.status]


async def _run(config: RunConfig, run_dir: RunDirectory, console: PipeSafeConsole) -> None:
    """Start the actors, answer the prompts, and take the actors down again."""
    async with AsyncExitStack() as stack:
        shutdown = stack.enter_context(
            Interrupts().listening(
                lambda: console.print("stopping; press Ctrl-C again to stop at once", style="yellow")
            )
        )
        failures = Failures(config.recovery)
        launched = launch_actors(evaluation_specs(config), config, failures)
        services = EvaluationServices(**await run_until_set(shutdown, stack.enter_async_context(launched)))
        restore_gc()
        report = await run_until_set(shutdown, _answer_all(services, config, run_dir, console, failures))
        about = {"model": config.model.path, "task": config.task.target, "samples": config.eval.samples}
        run_dir.write_json("evaluation.json", about | report.as_record())
        console.print(evaluation_table(report))


async def _answer_all(
    services: EvaluationServices, config: RunConfig, run_dir: RunDirectory, console: PipeSafeConsole, failures: Failures
) -> EvaluationReport:
    """Raises StalledError when no prompt is done for `watchdog.seconds`; the whole may take as long as it needs."""
    begin_activity("evaluation")
    watchdog = Watchdog(
        config.watchdog, failures.progress, lambda message: console.print(message, style="yellow", markup=False)
    )

    async def answer_all() -> EvaluationReport:
        prompts = await held_out_prompts(services, config)
        with AnswerProgress(console, len(prompts)) as progress:

            def on_answer(prompt: Prompt, scores: Scores | None) -> None:
                failures.step_trained()  # an answer is the progress that fills the budgets up
                progress.advance()
                if scores is not None:
                    run_dir.append("completions.jsonl", _completions_record(prompt, scores))

            return await evaluate(services, config, prompts, _VERSION, on_answer, detail="texts")

    return await race(answer_all(), watchdog.watch())


def _completions_record(prompt: Prompt, scores: Scores) -> dict[str, object]:
    """Under the names of `rollouts.jsonl`."""
    return {
        "prompt_serial": prompt.serial,
        "prompt": prompt.problem.question,
        "answer": prompt.problem.answer,
        "completions": scores.texts,
        "rewards": scores.rewards,
        "reward_parts": dict(scores.parts),
        **turns_record(scores),
    }
