"""What the scripts share: from what Hydra composed to an exit code, and every error as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.composition import explain, from_hydra
from grpo.config import RunConfig
from grpo.types import GRPOError

_INTERRUPTED = 130
_exit_codes: list[int] = []  # of the jobs of this command: one, or those of a sweep


def run_job(composed: DictConfig, work: Callable[[RunConfig, Path], int]) -> None:
    """Do `work(config, run folder)` and exit with the code that it returns; a sweep goes on after a job that failed."""
    code = _exit_code(composed, work, Path(HydraConfig.get().runtime.output_dir))
    _exit_codes.append(code)
    if HydraConfig.get().mode is RunMode.RUN or code == _INTERRUPTED:
        sys.exit(code)


def _exit_code(composed: DictConfig, work: Callable[[RunConfig, Path], int], folder: Path) -> int:
    try:
        return work(from_hydra(composed), folder)
    except (GRPOError, OSError) as error:  # found before the run began; later errors stand in what the run leaves
        print(f"error: {error}", file=sys.stderr)
        return 1


def main(hydra_main: Callable[[], None]) -> None:
    """Call a function decorated with `hydra.main`, whose jobs call `run_job`, and exit."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions, not as Hydra's printed traces
    try:
        hydra_main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except OSError as error:  # Hydra makes the folder of the run before our code is reached
        sys.exit(f"error: hydra.run.dir: can't write to {error.filename}: {error.strerror}; name another folder")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    sys.exit(max(_exit_codes, default=0))
