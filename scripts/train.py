"""Train a language model with GRPO: `python scripts/train.py [+experiment=NAME] [key=value ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.config import explain, from_hydra, register
from grpo.types import GRPOError

register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def run(composed: DictConfig) -> None:
    try:
        config = from_hydra(composed)
        from grpo.train import train  # torch and Ray are imported only for a config that can work

        code = train(config, Path(HydraConfig.get().runtime.output_dir))
    except GRPOError as error:
        sys.exit(f"error: {error}")
    if code:
        sys.exit(code)


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions, not as Hydra's printed traces
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except OSError as error:  # Hydra makes the folder of the run before our code is reached
        sys.exit(f"error: hydra.run.dir: can't write to {error.filename}: {error.strerror}; name another folder")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
