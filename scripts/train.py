"""Train a language model with GRPO: `python scripts/train.py [+experiment=NAME] [key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from grpo.cli.hydra_jobs import main, run_job
from grpo.config.composition import register
from grpo.config.schema import RunConfig
from grpo.utils.gc_tuning import relax_gc

register()


def _train(config: RunConfig, folder: Path) -> int:
    relax_gc()
    from grpo.cli.train import train  # torch and Ray are imported only for a config that can work

    return train(config, folder)


def _after_sweep(folder: Path) -> None:
    from grpo.report.sweep import show_sweep

    show_sweep(folder)


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def run(composed: DictConfig) -> None:
    run_job(composed, _train)


if __name__ == "__main__":
    main(run, _after_sweep)
