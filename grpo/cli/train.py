"""A whole run, from a config to its summary: `grpo.train`, and behind `grpo train` and `scripts/train.py`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo.actors.specs import actor_specs
from grpo.checkpoint.resume import ResumePoint, find_resume_point
from grpo.cli import preflight
from grpo.cli.lifecycle import Interrupts, call_beside_event_loop, outcome_of_run, ray_beside
from grpo.cluster.launch import launch
from grpo.config.composition import validate
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
from grpo.utils.aio import run_until_set
from grpo.utils.gc_tuning import restore_gc

log = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 5.0


def train(config: RunConfig, folder: str | Path) -> dict[str, Any]:
    """Train to the end of the run and return the content of its `summary.json`.

    The run leaves metrics, samples, checkpoints and a report in `folder`; a resumed run may continue in the folder of
    the run before. Progress is printed. A dry run prints its plan and returns {}.

    Raises GRPOError for a mistake that is found before Ray starts. A run that fails later returns its summary with
    `status` "failed" and the `error`; an interrupted one (Ctrl-C, SIGTERM) has `status` "interrupted". Where an event
    loop already runs in this thread, as in a notebook, the run gets a thread of its own and the call waits for it.

    Example:
        from grpo import compose, train

        config = compose("+experiment=tiny", "trainer.max_steps=50")
        summary = train(config, "runs/a")
        print(summary["reward_first"], summary["reward_last"])
    """
    interrupts = Interrupts()
    return call_beside_event_loop(interrupts, lambda: _train(config, Path(folder), interrupts))


def _train(config: RunConfig, folder: Path, interrupts: Interrupts) -> dict[str, Any]:
    startup = Startup()
    startup.ended("imports")
    console = PipeSafeConsole(soft_wrap=True)

    # Every mistake that shows without Ray is found here, in a few seconds. A program may have changed the config.
    config = validate(config)
    _print_warnings(warnings(config), console)
    task = preflight.check(config, actor_specs(config), partial(console.print, markup=False, highlight=False))
    if config.dry_run:
        preflight.print_plan(config, console)
        return {}
    resume, found = find_resume_point(config, folder)
    _print_warnings(found, console)
    if resume is not None:
        if config.resume == "auto" and resume.is_end_of(config.trainer.max_steps):
            console.print(f"{resume.path} is of the last step: nothing is left to do", highlight=False, markup=False)
            return _summary_of(resume.folder)
        console.print(f"resuming {resume.path} after step {resume.step}", highlight=False, markup=False)
    run_folder = resume.folder if resume else folder
    config, run_dir = preflight.open_run(config, task, run_folder, resume)
    startup.ended("checks")

    with _logging_to(run_folder / "run.log"):
        if run_folder != folder:
            _remove_unused(folder)
        try:
            summary = _run_on_ray(config, run_dir, resume, startup, interrupts)
        finally:
            run_dir.close()
        report = _report(run_dir.path) if config.observe.report and summary["steps"] else None
    _print_outcome(summary, run_dir.path, report)
    return summary


def _run_on_ray(
    config: RunConfig, run_dir: RunDirectory, resume: ResumePoint | None, startup: Startup, interrupts: Interrupts
) -> dict[str, Any]:
    """Train on the cluster; whatever ends it, the summary says so."""
    with redirect_output(run_dir.path / "run.log") as console:
        console.print("starting Ray and the actors ...", style="dim")
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        display = make_display(console, config.trainer.max_steps, config.observe.log_every)
        recorder = Recorder(
            run_dir,
            display,
            make_pacer(config),
            Failures(config.recovery),
            startup=startup,
            make_sinks=partial(make_sinks, config.observe.sinks, run_dir.path, dataclasses.asdict(config)),
            wall_s_before=resume.progress["records"]["wall_s"] if resume else 0.0,
        )
        try:
            check = partial(preflight.check_runnable, config)
            with outcome_of_run() as outcome, ray_beside(check, config.cluster, say):
                asyncio.run(_run(config, recorder, display, interrupts, resume))
            return recorder.write_summary(outcome.status, outcome.error)
        finally:
            recorder.sinks.close()


async def _run(
    config: RunConfig, recorder: Recorder, display: Display, interrupts: Interrupts, resume: ResumePoint | None
) -> None:
    """Start the actors, train, and take the actors down again."""
    recorder.startup.ended("ray")
    async with AsyncExitStack() as stack:
        shutdown = stack.enter_context(
            interrupts.listening(lambda: display.warn("stopping after this step; press Ctrl-C again to stop at once"))
        )
        services = await run_until_set(shutdown, stack.enter_async_context(launch(config, recorder.failures)))
        recorder.startup.ended("actors")
        restore_gc()
        try:
            async with open_to_operators(recorder.run_dir.path, services):
                with display:
                    timeline = recorder.timeline(config.observe.timeline_mb) if config.observe.timeline else None
                    async with collecting(
                        services, recorder.failures.progress, recorder.measured, timeline, recorder.warn
                    ):
                        await train_loop(services, config, recorder, shutdown, resume)
        finally:
            if (task := asyncio.current_task()) and not task.cancelling():  # a second Ctrl-C waits for nothing
                recorder.add_prompt_counts(await _prompt_counts(services))


async def _prompt_counts(services: Services) -> dict[str, int]:
    """Return the dataloader's side of the ledger; empty when the dataloader is what failed."""
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            counts: dict[str, int] = await services.dataloader.stats.call_one()
            return counts
    except (InfrastructureError, TimeoutError) as error:
        log.warning("no prompt counts: %s", error)
        return {}


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Write the driver's log to `file` within the block.

    Hydra has configured the root logger for the folder that it made, which is another one when a run is resumed; a
    program that calls `train` keeps its own logging, and only this package's messages go to the file as well.
    """
    root, package = logging.getLogger(), logging.getLogger("grpo")
    of_hydra = [each for each in root.handlers if isinstance(each, logging.FileHandler) and each.name == "file"]
    if any(Path(each.baseFilename) == file.absolute() for each in of_hydra):
        yield
        return
    for each in of_hydra:
        root.removeHandler(each)
        each.close()
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    logger, level = (root, root.level) if of_hydra else (package, logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


def _remove_unused(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that continues in another one."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder)
        with suppress(OSError):  # other runs began on that day
            folder.parent.rmdir()


def _summary_of(folder: Path) -> dict[str, Any]:
    """Read the summary that a completed run has left."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary


def _report(folder: Path) -> Path | None:
    """Leave `report.html`; a run that was trained is not failed by its report."""
    try:
        return write_report([folder])
    except Exception as error:
        log.exception("no report")
        console = PipeSafeConsole(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"warning: no report: {error}; `grpo report` makes one", style="yellow", markup=False)
        return None


def _print_warnings(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(f"warning: {line}", style="yellow", markup=False)


def _print_outcome(summary: dict[str, Any], folder: Path, report: Path | None) -> None:
    console = PipeSafeConsole(soft_wrap=True, highlight=False)
    if summary["error"]:
        PipeSafeConsole(stderr=True, soft_wrap=True, highlight=False).print(f"error: {summary['error']}", markup=False)
    console.print(f"{summary['status']} after {summary['steps']} steps in {summary['wall_s']:.0f} s", markup=False)
    for name, label in (("reward", "reward (first and last tenth)"), ("eval", "held-out reward")):
        first, last = summary[f"{name}_first"], summary[f"{name}_last"]
        if first is not None and last is not None:
            console.print(f"{label}: {first:.3f} -> {last:.3f}", markup=False)
    _print_pass_at(summary["evaluations"], console)
    console.print(f"run folder: {folder}", markup=False)
    if report is not None:
        console.print(f"report: {report}", markup=False)


def _print_pass_at(evaluations: Sequence[dict[str, float]], console: Console) -> None:
    """Print pass@k where prompts were answered more than once; pass@1 alone says little more than the reward."""
    names = [name for name in (evaluations or [{}])[0] if name.startswith("pass@")]
    if len(names) > 1 and len(evaluations) > 1:
        curves = (f"{name} {evaluations[0][name]:.3f} -> {evaluations[-1][name]:.3f}" for name in names)
        console.print(f"held-out {', '.join(curves)}", markup=False)
