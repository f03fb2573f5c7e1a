"""All that a learner knows, as one flat buffer per rank and a few counters: what other learners go on from."""

# MERGED: A learner's state as files: tensors, one file for each rank that it had, and all else in `trainer.json`.
#
#     trainer.safetensors                                    one rank's, which is all
#     trainer-00001-of-00002.safetensors, ...                those of two, named as Hugging Face names parts
#
# This is not torch.distributed.checkpoint: who writes is no rank, and training goes on meanwhile.
#

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from grpo.errors import CheckpointError
from grpo.utils.ranks import Ranks, ShardRange
from grpo.weights.flat_buffer import TensorSpec, all_finite, buffer_for, lay_out, views

MODEL, MOMENTS = "model", ("exp_avg", "exp_avg_sq")  # prefixes of a parameter's name
RNG_CPU, RNG_CUDA = "rng.cpu", "rng.cuda"


@dataclass(frozen=True)
class TrainerState:
    """What one rank has of a learner after `version` steps; that of a single rank is all.

    `buffer` is uint8 [bytes] and holds, by name: `model.<parameter>`, `exp_avg.<parameter>` and
    `exp_avg_sq.<parameter>` in the parameter's dtype (zeros where the optimizer has no moments yet), and the states of
    the random generators, `rng.cpu` and, on a GPU, `rng.cuda`, uint8 [bytes]. Tied parameters appear once. `rows` says
    by parameter which rows of it and of its moments these are; what it does not name is whole. `counters` is
    JSON-able, and the same on all ranks.
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]
    counters: Mapping[str, Any]
    rank: int = 0
    rows: Mapping[str, ShardRange] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views into the buffer by name. Read-only: the buffer may be shared by every process of the node."""
        return views(self.specs, self.buffer)

    def rows_of(self, spec: TensorSpec) -> ShardRange:
        """Which rows a tensor of the buffer holds."""
        return self.rows.get(spec.name.partition(".")[2]) or ShardRange.of(spec.shape, Ranks.alone())


class Parameters(Mapping[str, Tensor]):
    """What is trained, whole, by their own names, from the states of all ranks.

    With one rank they are views into its buffer. With several each is put together when it is asked for.
    """

    def __init__(self, states: Sequence[TrainerState]) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        for state in sorted(states, key=lambda state: state.rank):
            for name, tensor in state.tensors():
                kind, _, parameter = name.partition(".")
                if kind == MODEL:
                    self._parts.setdefault(parameter, []).append(tensor)

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class StateWriter:
    """Copies a rank's parameters, its optimizer and random generators into a host buffer that is used again and again.

    `parameters` are the rows that the rank has, `rows` says which. The optimizer is AdamW without amsgrad. The buffer
    is allocated by the first `write`: some runs never need it.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], rows: Mapping[str, ShardRange], optimizer: Optimizer, rank: int
    ) -> None:
        self._parameters, self._rows, self._rank = parameters, rows, rank
        self._optimizer = optimizer
        self._device = next(iter(parameters.values())).device
        self.specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in self._layout())
        self._buffer: NDArray[np.uint8] | None = None

    @torch.no_grad()
    def write(self, version: int, counters: Mapping[str, Any]) -> TrainerState:
        """Snapshot; adds the optimizer's steps by parameter to `counters`. The next call overwrites the buffer."""
        if self._buffer is None:
            self._buffer = buffer_for(self.specs)
        counters = {**counters, "optimizer_steps": self._steps()}
        state = TrainerState(version, self.specs, self._buffer, counters, self._rank, self._rows)
        sources = dict(self._present())
        for name, target in state.tensors():
            if name in sources:
                target.copy_(sources[name])
            else:
                target.zero_()
        return state

    @torch.no_grad()
    def read(self, states: Sequence[TrainerState]) -> None:
        """The inverse of `write`, from the states of any number of ranks, which `check` has let pass."""
        steps, parts = states[0].counters["optimizer_steps"], _parts(states)
        for name, parameter in self._parameters.items():
            own = self._rows.get(name) or ShardRange.of(parameter.shape, Ranks.alone())
            _copy_rows(parameter, own, parts[f"{MODEL}.{name}"])
            self._optimizer.state.pop(parameter, None)
            if name in steps:
                moments = {kind: torch.empty_like(parameter) for kind in MOMENTS}
                for kind, target in moments.items():
                    _copy_rows(target, own, parts[f"{kind}.{name}"])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps[name]), device=parameter.device),
                    **moments,
                }
        by_rank = {state.rank: state for state in states}
        random = dict(by_rank.get(self._rank, states[0]).tensors())
        torch.set_rng_state(random[RNG_CPU].clone())
        if self._device.type == "cuda" and RNG_CUDA in random:
            torch.cuda.set_rng_state(random[RNG_CUDA].clone(), self._device)

    def check(self, states: Sequence[TrainerState]) -> None:
        """Raise CheckpointError, naming what differs, for states of another model, or that don't belong together.

        Or that are not all there, or not finite. Every rank sees all of them, so all come to the same end.
        """
        first = states[0]
        if any((state.version, state.counters) != (first.version, first.counters) for state in states):
            raise CheckpointError("the trainer's states are of different steps: not restored")
        expected = _forms(self.specs, self._rows)
        for state in states:
            if expected != (found := _forms(state.specs, state.rows)):
                differing = sorted({name for name, _ in expected.items() ^ found.items()})
                raise CheckpointError(f"the trainer's state does not fit the model; it differs in {differing[:4]}")
        if unknown := sorted(first.counters["optimizer_steps"].keys() - self._parameters.keys()):
            raise CheckpointError(f"the trainer's state counts steps of unknown parameters: {unknown[:4]}")
        for name, parts in _parts(states).items():
            _check_cover(name, [rows for rows, _ in parts])
        for state in states:
            for spec in state.specs:
                content = state.buffer[spec.offset : spec.offset + spec.nbytes]
                if spec.dtype.is_floating_point and not all_finite(content, spec.dtype):
                    raise CheckpointError(f"{spec.name} holds NaN or infinity in the trainer's state: not restored")

    def _layout(self) -> Iterator[tuple[str, Tensor]]:
        for kind in (MODEL, *MOMENTS):
            for name, parameter in self._parameters.items():
                yield f"{kind}.{name}", parameter
        yield from self._rng()

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield f"{MODEL}.{name}", parameter
            if moments := self._optimizer.state.get(parameter):
                yield from ((f"{kind}.{name}", moments[kind]) for kind in MOMENTS)
        yield from self._rng()

    def _rng(self) -> Iterator[tuple[str, Tensor]]:
        yield RNG_CPU, torch.get_rng_state()
        if self._device.type == "cuda":
            yield RNG_CUDA, torch.cuda.get_rng_state(self._device)

    def _steps(self) -> dict[str, int]:
        states = {name: self._optimizer.state.get(parameter) for name, parameter in self._parameters.items()}
        return {name: int(state["step"]) for name, state in states.items() if state}


def _forms(
    specs: Sequence[TensorSpec], rows: Mapping[str, ShardRange]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes of whole tensors, and dtypes, by name.

    A run may move between CPU and GPU, so the GPU's generator need not be there.
    """
    return {spec.name: (_whole(spec, rows), spec.dtype) for spec in specs if spec.name != RNG_CUDA}


def _whole(spec: TensorSpec, rows: Mapping[str, ShardRange]) -> tuple[int, ...]:
    """The shape of a tensor of which these are rows; that of the part itself, if it is not as many as it says."""
    part = rows.get(spec.name.partition(".")[2])
    return (part.total, *spec.shape[1:]) if part and spec.shape[:1] == (part.count,) else spec.shape


def _parts(states: Sequence[TrainerState]) -> dict[str, list[tuple[ShardRange, Tensor]]]:
    """What there is of every parameter and its moments, by the name in the buffer, in the order of their rows."""
    parts: dict[str, list[tuple[ShardRange, Tensor]]] = {}
    for state in states:
        for spec, (name, tensor) in zip(state.specs, state.tensors(), strict=True):
            if name not in (RNG_CPU, RNG_CUDA):
                parts.setdefault(name, []).append((state.rows_of(spec), tensor))
    return {name: sorted(found, key=lambda part: part[0].start) for name, found in parts.items()}


def _check_cover(name: str, parts: Sequence[ShardRange]) -> None:
    ends = [0, *(rows.stop for rows in parts)]
    if [rows.start for rows in parts] != ends[:-1] or ends[-1] != parts[0].total:
        raise CheckpointError(
            f"the trainer's states don't have every row of {name} once: those of all ranks are needed"
        )


def _copy_rows(target: Tensor, own: ShardRange, parts: Sequence[tuple[ShardRange, Tensor]]) -> None:
    for rows, tensor in parts:
        to, of = own.overlap(rows)
        torch.atleast_1d(target)[to].copy_(torch.atleast_1d(tensor)[of])


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
        parts = {name: ShardRange(*part) for name, part in by_name.items()}
        states.append(TrainerState(int(about["version"]), specs, buffer, dict(about["counters"]), rank, parts))
    return states


def _tensors(rank: int, size: int) -> str:
    return "trainer.safetensors" if size == 1 else f"trainer-{rank + 1:05}-of-{size:05}.safetensors"
