"""Train a language model with GRPO: `python scripts/train.py [+experiment=NAME] [key=value ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.composition import explain, from_hydra, register
from grpo.types import GRPOError

register()

_INTERRUPTED = 130
_exit_codes: list[int] = []  # of the jobs of this command: one, or those of a sweep


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def run(composed: DictConfig) -> None:
    code = _run(composed, Path(HydraConfig.get().runtime.output_dir))
    _exit_codes.append(code)
    if HydraConfig.get().mode is RunMode.RUN or code == _INTERRUPTED:
        sys.exit(code)  # a sweep goes on after a job that failed


def _run(composed: DictConfig, folder: Path) -> int:
    try:
        config = from_hydra(composed)
        from grpo.train import train  # torch and Ray are imported only for a config that can work

        return train(config, folder)
    except (GRPOError, OSError) as error:  # found before the run began; later errors stand in its summary
        print(f"error: {error}", file=sys.stderr)
        return 1


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions, not as Hydra's printed traces
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except OSError as error:  # Hydra makes the folder of the run before our code is reached
        sys.exit(f"error: hydra.run.dir: can't write to {error.filename}: {error.strerror}; name another folder")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    sys.exit(max(_exit_codes, default=0))


if __name__ == "__main__":
    main()
