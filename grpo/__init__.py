"""Asynchronous, distributed GRPO post-training of language models on Ray.

from grpo import compose, train

config = compose("+experiment=tiny", "trainer.max_steps=50")
summary = train(config, "runs/a")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.cli.train import train
    from grpo.config.composition import compose

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "train"]

_HOMES = {"compose": "grpo.config.composition", "train": "grpo.cli.train"}  # imported when used: torch takes seconds


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
