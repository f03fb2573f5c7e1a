"""Commands whose settings Hydra composes: from its arguments to an exit code, and every error in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.cli.main import print_warning
from grpo.config.composition import CONFIGS, explain, from_hydra, register
from grpo.config.renamed import rewrite_overrides
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError, GRPOError
from grpo.types import EXIT_CODES
from grpo.utils.gc_tuning import relax_gc

Work = Callable[[RunConfig, Path], int]  # with a config, in a folder; returns an exit code


class _Job(NamedTuple):
    exit_code: int
    sweep: Path | None  # folder of the sweep that the job is part of


def train() -> NoReturn:
    """Train with the settings on the command line, or with each combination of a sweep (`-m`), and exit."""
    run_jobs(_train, _after_sweep)


def evaluate() -> NoReturn:
    """Evaluate the model that the command line names, and exit."""
    run_jobs(_evaluate)


# Torch and Ray take seconds to import: only a config that can work is worth the wait.


def _train(config: RunConfig, folder: Path) -> int:
    relax_gc()
    from grpo.cli.train import train

    return EXIT_CODES[train(config, folder).get("status", "completed")]


def _after_sweep(folder: Path) -> None:
    from grpo.report.sweep import show_sweep

    show_sweep(folder)


def _evaluate(config: RunConfig, folder: Path) -> int:
    relax_gc()
    from grpo.cli.evaluate import evaluate_model

    return evaluate_model(config, folder)


def run_jobs(work: Work, after_sweep: Callable[[Path], None] | None = None) -> NoReturn:
    """Call `work` with the config and the folder that Hydra makes of `sys.argv`, for each job of a sweep, and exit.

    A sweep continues after a job that failed. However it ends, `after_sweep` is called with its folder.
    """
    jobs: list[_Job] = []

    @hydra_main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def job(composed: DictConfig) -> None:
        hydra = HydraConfig.get()
        code = _exit_code(composed, work, Path(hydra.runtime.output_dir))
        jobs.append(_Job(code, Path(hydra.sweep.dir).absolute() if hydra.mode is RunMode.MULTIRUN else None))
        if hydra.mode is RunMode.RUN or code == EXIT_CODES["interrupted"]:
            sys.exit(code)

    register()
    try:
        _call(job)
    finally:
        if after_sweep is not None and jobs and (folder := jobs[-1].sweep) is not None:
            after_sweep(folder)
    sys.exit(max((each.exit_code for each in jobs), default=EXIT_CODES["completed"]))


def _exit_code(composed: DictConfig, work: Work, folder: Path) -> int:
    try:
        return work(from_hydra(composed, HydraConfig.get().overrides.task, warn=print_warning), folder)
    except (GRPOError, OSError) as error:  # found before the run began; later errors stand in what the run leaves
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODES["failed"]


def _call(job: Callable[[], None]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions, not as Hydra's printed traces
    try:
        sys.argv[1:], renamed = rewrite_overrides(sys.argv[1:])
        for line in renamed:
            print_warning(line)
        job()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except OSError as error:  # Hydra makes the folder of the run before our code is reached
        sys.exit(f"error: hydra.run.dir: can't write to {error.filename}: {error.strerror}; name another folder")
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["interrupted"])
