"""What the scripts share: from what Hydra composed to an exit code, and every error as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.config.composition import explain, from_hydra
from grpo.config.schema import RunConfig
from grpo.errors import GRPOError
from grpo.types import EXIT_CODES


class _Job(NamedTuple):
    exit_code: int
    sweep: Path | None  # the folder of the sweep that it is part of


_jobs: list[_Job] = []  # of this command: one, or those of a sweep


def run_job(composed: DictConfig, work: Callable[[RunConfig, Path], int]) -> None:
    """Do `work(config, run folder)` and exit with the code that it returns; a sweep goes on after a job that failed."""
    hydra = HydraConfig.get()
    code = _exit_code(composed, work, Path(hydra.runtime.output_dir))
    _jobs.append(_Job(code, Path(hydra.sweep.dir).absolute() if hydra.mode is RunMode.MULTIRUN else None))
    if hydra.mode is RunMode.RUN or code == EXIT_CODES["interrupted"]:
        sys.exit(code)


def _exit_code(composed: DictConfig, work: Callable[[RunConfig, Path], int], folder: Path) -> int:
    try:
        return work(from_hydra(composed), folder)
    except (GRPOError, OSError) as error:  # found before the run began; later errors stand in what the run leaves
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODES["failed"]


def main(hydra_main: Callable[[], None], after_sweep: Callable[[Path], None] | None = None) -> None:
    """Call a function decorated with `hydra.main`, whose jobs call `run_job`, and exit.

    However a sweep ends, `after_sweep` is called with its folder.
    """
    try:
        _call(hydra_main)
    finally:
        if after_sweep is not None and _jobs and (folder := _jobs[-1].sweep) is not None:
            after_sweep(folder)


def _call(hydra_main: Callable[[], None]) -> NoReturn:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions, not as Hydra's printed traces
    try:
        hydra_main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except OSError as error:  # Hydra makes the folder of the run before our code is reached
        sys.exit(f"error: hydra.run.dir: can't write to {error.filename}: {error.strerror}; name another folder")
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["interrupted"])
    sys.exit(max((job.exit_code for job in _jobs), default=EXIT_CODES["completed"]))
