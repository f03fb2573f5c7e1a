"""A learner's state as files: tensors, one file for each rank that it had, and all else in `trainer.json`.

    trainer.safetensors                                    one rank's, which is all
    trainer-00001-of-00002.safetensors, ...                those of two, named as Hugging Face names parts

This is not torch.distributed.checkpoint: who writes is no rank, and training goes on meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from safetensors.torch import load_file, save_file

from grpo.flat_buffer import buffer_for, lay_out, views
from grpo.learner.rows import Rows
from grpo.learner.state import TrainerState

COUNTERS = "trainer.json"


def write_states(folder: Path, states: Sequence[TrainerState]) -> None:
    """Write those of all ranks, in any order."""
    states = sorted(states, key=lambda state: state.rank)
    for state in states:
        save_file(dict(state.tensors()), folder / _tensors(state.rank, len(states)))
    about = {
        "version": states[0].version,
        "counters": states[0].counters,
        "rows": [{name: astuple(rows) for name, rows in state.rows.items()} for state in states],
    }
    (folder / COUNTERS).write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def read_states(folder: Path) -> list[TrainerState]:
    """The inverse of `write_states`, each state in a buffer of its own, in the order of ranks.

    Raises OSError, SafetensorError, ValueError, KeyError or TypeError.
    """
    about = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    states = []
    for rank, by_name in enumerate(rows := about.get("rows", [{}])):  # none: written when there was always one rank
        tensors = load_file(folder / _tensors(rank, len(rows)))
        specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        buffer = buffer_for(specs)
        for name, target in views(specs, buffer):
            target.copy_(tensors.pop(name))
        parts = {name: Rows(*part) for name, part in by_name.items()}
        states.append(TrainerState(int(about["version"]), specs, buffer, dict(about["counters"]), rank, parts))
    return states


def _tensors(rank: int, size: int) -> str:
    return "trainer.safetensors" if size == 1 else f"trainer-{rank + 1:05}-of-{size:05}.safetensors"
