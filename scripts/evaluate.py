"""Evaluate a model on held-out prompts: `python scripts/evaluate.py [model=NAME] [task=NAME] [key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from grpo.cli.hydra_jobs import main, run_job
from grpo.config.composition import register
from grpo.config.schema import RunConfig
from grpo.utils.gc_tuning import relax_gc

register()


def _evaluate(config: RunConfig, folder: Path) -> int:
    relax_gc()
    from grpo.cli.evaluate import evaluate_model  # torch and Ray are imported only for a config that can work

    return evaluate_model(config, folder)


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def run(composed: DictConfig) -> None:
    run_job(composed, _evaluate)


if __name__ == "__main__":
    main(run)
