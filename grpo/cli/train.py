"""A whole run, from a composed config to the summary."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo.actors.specs import ActorSpec, actor_specs
from grpo.checkpoint.resume import ResumePoint, find_resume_point
from grpo.cli import preflight
from grpo.cli.lifecycle import drive
from grpo.cluster.launch import launch
from grpo.config.schema import RunConfig
from grpo.config.warnings import warnings
from grpo.driver.context import make_pacer
from grpo.driver.loop import train_loop
from grpo.driver.recorder import Recorder
from grpo.errors import InfrastructureError
from grpo.observe.collector import collecting
from grpo.observe.metrics import Startup
from grpo.observe.run_dir import RunDirectory
from grpo.observe.sinks.fanout import make_sinks
from grpo.observe.terminal.display import Display, make_display
from grpo.observe.terminal.output import PipeSafeConsole, redirect_output
from grpo.report.page import write_report
from grpo.services.control import open_to_operators
from grpo.services.failures import Failures
from grpo.services.handle import Services
from grpo.types import EXIT_CODES
from grpo.utils.aio import run_until_set
from grpo.utils.gc_tuning import restore_gc

log = logging.getLogger(__name__)
_STATS_TIMEOUT_S = 5.0


def train(config: RunConfig, folder: Path) -> int:
    """Run to the end and return the exit code.

    Raises GRPOError for what is wrong before the cluster is started; what goes wrong later is shown, stands in
    `summary.json`, and gives exit code 1. An interrupted run gives 130.
    """
    startup = Startup()
    startup.ended("imports")
    console = PipeSafeConsole(soft_wrap=True)
    for warning in warnings(config):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    task = preflight.check(config, actor_specs(config), partial(console.print, markup=False, highlight=False))
    if config.dry_run:
        print_plan(config, console)
        return EXIT_CODES["completed"]
    resume, found = find_resume_point(config, folder)
    for warning in found:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if resume is not None:
        if config.resume == "auto" and resume.is_end_of(config.trainer.max_steps):
            console.print(f"{resume.path} is of the last step: nothing is left to do", highlight=False, markup=False)
            return EXIT_CODES["completed"]
        console.print(f"going on from {resume.path}, step {resume.step}", highlight=False, markup=False)
        if resume.folder != folder:
            _leave(folder, resume.folder)
    config, run_dir = preflight.open_run(config, task, resume.folder if resume else folder, resume)
    startup.ended("checks")
    try:
        summary = _train(config, run_dir, resume, startup)
    finally:
        run_dir.close()
    report = _report(run_dir.path) if config.observe.report and summary["steps"] else None
    _print_outcome(summary, run_dir.path, report)
    return EXIT_CODES[summary["status"]]


def _leave(unused: Path, folder: Path) -> None:
    """The run goes on in another folder than Hydra has made: log there, and leave nothing empty behind."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename) == unused.absolute() / "run.log":
            elsewhere = logging.FileHandler(folder / "run.log", delay=True)
            elsewhere.setFormatter(handler.formatter)
            root.removeHandler(handler)
            handler.close()
            root.addHandler(elsewhere)
    if [path.name for path in unused.iterdir()] == [".hydra"]:
        shutil.rmtree(unused)
        with suppress(OSError):  # other runs began on that day
            unused.parent.rmdir()


def _train(config: RunConfig, run_dir: RunDirectory, resume: ResumePoint | None, startup: Startup) -> dict[str, Any]:
    """Run on the cluster; whatever ends it, the summary says so."""
    with redirect_output(run_dir.path / "run.log") as console:
        console.print("starting Ray and the actors ...", style="dim")
        display = make_display(console, config.trainer.max_steps, config.observe.log_every)
        recorder = Recorder(run_dir, display, make_pacer(config), Failures(config.recovery))
        recorder.startup = startup
        if resume is not None:
            recorder.offset_clock(resume.progress["records"]["wall_s"])
        recorder.sinks = make_sinks(config.observe.sinks, run_dir.path, dataclasses.asdict(config), recorder.warn)
        try:
            status, error = drive(
                config.cluster,
                partial(preflight.check_runnable, config),
                lambda shutdown: _run(config, recorder, display, shutdown, resume),
                lambda: display.warn("stopping after this step; press Ctrl-C again to stop at once"),
                partial(console.print, markup=False, highlight=False, soft_wrap=True),
            )
            return recorder.write_summary(status, error)
        finally:
            recorder.sinks.close()


async def _run(
    config: RunConfig, recorder: Recorder, display: Display, shutdown: asyncio.Event, resume: ResumePoint | None
) -> None:
    recorder.startup.ended("ray")
    async with AsyncExitStack() as stack:
        services = await run_until_set(shutdown, stack.enter_async_context(launch(config, recorder.failures)))
        recorder.startup.ended("actors")
        recorder.replicas = services.replicas
        restore_gc()
        try:
            async with open_to_operators(recorder.run_dir.path, services):
                with display:
                    timeline = recorder.timeline(config.observe.timeline_mb) if config.observe.timeline else None
                    async with collecting(services, recorder.failures.progress, recorder.measured, timeline):
                        await train_loop(services, config, recorder, shutdown, resume)
        finally:
            recorder.replicas = partial(dict, services.replicas())  # those of the end
            if (this := asyncio.current_task()) and not this.cancelling():  # else somebody pressed Ctrl-C twice
                recorder.prompts |= await _prompt_counts(services)


async def _prompt_counts(services: Services) -> dict[str, int]:
    """The dataloader's side of the ledger; empty when the dataloader is what failed."""
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            counts: dict[str, int] = await services.dataloader.stats.call_one()
            return counts
    except (InfrastructureError, TimeoutError) as error:
        log.warning("no prompt counts: %s", error)
        return {}


def print_plan(config: RunConfig, console: Console) -> None:
    """What the run would start and how far its rollouts may run ahead."""
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
        console.print(f"trained         adapters of rank {config.lora.rank}; the base stays as it is", highlight=False)
    if config.uses_adapters and config.loss.beta > 0:
        console.print("reference       the trainer's model with its adapters off", highlight=False)


def plan_table(specs: Sequence[ActorSpec]) -> Table:
    table = Table("actor", "processes", "CPUs each", "GPUs each", title="plan", title_justify="left")
    for spec in specs:
        table.add_row(spec.name, str(spec.processes), f"{spec.num_cpus:g}", f"{spec.num_gpus:g}")
    return table


def _report(folder: Path) -> Path | None:
    """Leave `report.html`; a run that was trained is not failed by its report."""
    try:
        return write_report([folder])
    except Exception as error:
        log.exception("no report")
        console = PipeSafeConsole(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"warning: no report: {error}; scripts/report.py makes one", style="yellow", markup=False)
        return None


def _print_outcome(summary: dict[str, Any], folder: Path, report: Path | None) -> None:
    console = PipeSafeConsole(soft_wrap=True, highlight=False)
    if summary["error"]:
        PipeSafeConsole(stderr=True, soft_wrap=True, highlight=False).print(f"error: {summary['error']}", markup=False)
    console.print(f"{summary['status']} after {summary['steps']} steps in {summary['wall_s']:.0f} s", markup=False)
    for name in ("reward", "eval"):
        first, last = summary[f"{name}_first"], summary[f"{name}_last"]
        if first is not None and last is not None:
            label = {"reward": "reward (first and last tenth)", "eval": "held-out reward"}[name]
            console.print(f"{label}: {first:.3f} -> {last:.3f}", markup=False)
    _print_pass_at(summary["evaluations"], console)
    console.print(f"run folder: {folder}", markup=False)
    if report is not None:
        console.print(f"report: {report}", markup=False)


def _print_pass_at(evaluations: Sequence[dict[str, float]], console: Console) -> None:
    """Where prompts were answered more than once; pass@1 alone says little more than the reward."""
    names = [name for name in (evaluations or [{}])[0] if name.startswith("pass@")]
    if len(names) > 1 and len(evaluations) > 1:
        curves = (f"{name} {evaluations[0][name]:.3f} -> {evaluations[-1][name]:.3f}" for name in names)
        console.print(f"held-out {', '.join(curves)}", markup=False)
