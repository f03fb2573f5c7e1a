"""The state of a learner: one flat buffer per rank with a few counters, and the files that hold them.

    trainer.safetensors                                    of a learner with one rank
    trainer-00001-of-00002.safetensors, ...                of two ranks, numbered as Hugging Face numbers shards
    trainer.json                                           version, counters and row ranges of all ranks

This is not torch.distributed.checkpoint, because the writer is not a rank: training continues while it writes.
"""

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
COUNTERS = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """One rank's part of a learner after `version` steps; with a single rank it is the whole state.

    `buffer` is uint8 [bytes] and holds, by name: `model.<parameter>`, `exp_avg.<parameter>` and
    `exp_avg_sq.<parameter>` in the parameter's dtype (zeros if the optimizer has no moments yet), and the states of the
    random generators, `rng.cpu` and, on a GPU, `rng.cuda`, uint8 [bytes]. Tied parameters appear once. `rows` has the
    row range of each sharded parameter and its moments; parameters that it does not list are whole. `counters` is
    JSON-able and equal on all ranks.
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]
    counters: Mapping[str, Any]
    rank: int = 0
    rows: Mapping[str, ShardRange] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield views into the buffer by name. Read-only: every process of the node may share the buffer."""
        return views(self.specs, self.buffer)

    def rows_of(self, spec: TensorSpec) -> ShardRange:
        """Return the row range of a tensor of the buffer."""
        return self.rows.get(spec.name.partition(".")[2]) or ShardRange.of(spec.shape, Ranks.alone())


class Parameters(Mapping[str, Tensor]):
    """The whole trained parameters by name, from the states of all ranks.

    With one rank the tensors are views into its buffer. With several each one is concatenated on access.
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
    """Copy a rank's parameters, optimizer and random generators into a host buffer that is reused.

    `parameters` are the rank's shards, `rows` their row ranges. The optimizer is AdamW without amsgrad. The first
    `write` allocates the buffer, since some runs never need it.

    Example:
        writer = StateWriter(trained_parameters(model), {}, optimizer, rank=0)
        state = writer.write(version=3, counters={"tokens": 1000})
        writer.check([state])
        writer.read([state])     # the model, the optimizer and the random generators are as before
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
        """Snapshot; `counters` gains the optimizer's steps by parameter. The next call overwrites the buffer."""
        if self._buffer is None:
            self._buffer = buffer_for(self.specs)
        counters = {**counters, "optimizer_steps": self._steps()}
        state = TrainerState(version, self.specs, self._buffer, counters, self._rank, self._rows)
        sources = dict(self._sources())
        for name, target in state.tensors():
            if name in sources:
                target.copy_(sources[name])
            else:
                target.zero_()
        return state

    @torch.no_grad()
    def read(self, states: Sequence[TrainerState]) -> None:
        """Restore from the states of all ranks, of any number, which must have passed `check`."""
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

        # A rank beyond the number of saved ranks continues with the first rank's random numbers.
        by_rank = {state.rank: state for state in states}
        random = dict(by_rank.get(self._rank, states[0]).tensors())
        torch.set_rng_state(random[RNG_CPU].clone())
        if self._device.type == "cuda" and RNG_CUDA in random:
            torch.cuda.set_rng_state(random[RNG_CUDA].clone(), self._device)

    def check(self, states: Sequence[TrainerState]) -> None:
        """Raise CheckpointError, naming the difference, unless the states are complete, finite and of this model.

        Every rank sees all states, so all ranks come to the same result.
        """
        first = states[0]
        if any((state.version, state.counters) != (first.version, first.counters) for state in states):
            raise CheckpointError("the trainer's states are of different steps: not restored")
        expected = _forms(self.specs, self._rows)
        for state in states:
            if expected != (actual := _forms(state.specs, state.rows)):
                differing = sorted({name for name, _ in expected.items() ^ actual.items()})
                raise CheckpointError(f"the trainer's state does not fit the model; it differs in {differing[:4]}")
        if unknown := sorted(first.counters["optimizer_steps"].keys() - self._parameters.keys()):
            raise CheckpointError(f"the trainer's state counts steps of unknown parameters: {unknown[:4]}")

        # The row ranges of all ranks must cover every tensor once.
        for name, parts in _parts(states).items():
            ranges = [rows for rows, _ in parts]
            ends = [0, *(rows.stop for rows in ranges)]
            if [rows.start for rows in ranges] != ends[:-1] or ends[-1] != ranges[0].total:
                raise CheckpointError(
                    f"the trainer's states don't have every row of {name} once; the states of all ranks are needed"
                )
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

    def _sources(self) -> Iterator[tuple[str, Tensor]]:
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


def write_states(folder: Path, states: Sequence[TrainerState]) -> None:
    """Write the states of all ranks, given in any order."""
    states = sorted(states, key=lambda state: state.rank)
    for state in states:
        save_file(dict(state.tensors()), folder / _tensor_file(state.rank, len(states)))
    record = {
        "version": states[0].version,
        "counters": states[0].counters,
        "rows": [{name: astuple(rows) for name, rows in state.rows.items()} for state in states],
    }
    (folder / COUNTERS).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def read_states(folder: Path) -> list[TrainerState]:
    """Return what `write_states` wrote, in the order of ranks, each state in its own buffer.

    Raises OSError, SafetensorError, ValueError, KeyError or TypeError.
    """
    record = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    rows = record.get("rows", [{}])  # absent in checkpoints from before there were ranks
    states = []
    for rank, by_name in enumerate(rows):
        tensors = load_file(folder / _tensor_file(rank, len(rows)))
        specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        buffer = buffer_for(specs)
        for name, target in views(specs, buffer):
            target.copy_(tensors.pop(name))
        parts = {name: ShardRange(*part) for name, part in by_name.items()}
        states.append(TrainerState(int(record["version"]), specs, buffer, dict(record["counters"]), rank, parts))
    return states


def _tensor_file(rank: int, size: int) -> str:
    return "trainer.safetensors" if size == 1 else f"trainer-{rank + 1:05}-of-{size:05}.safetensors"


def _forms(
    specs: Sequence[TensorSpec], rows: Mapping[str, ShardRange]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape of the whole tensor and its dtype by name.

    The GPU's random generator is optional, since a run may move between CPU and GPU.
    """
    return {spec.name: (_whole_shape(spec, rows), spec.dtype) for spec in specs if spec.name != RNG_CUDA}


def _whole_shape(spec: TensorSpec, rows: Mapping[str, ShardRange]) -> tuple[int, ...]:
    """Return the shape of the whole tensor of a shard; the shard's own shape if it contradicts its row range."""
    part = rows.get(spec.name.partition(".")[2])
    return (part.total, *spec.shape[1:]) if part and spec.shape[:1] == (part.count,) else spec.shape


def _parts(states: Sequence[TrainerState]) -> dict[str, list[tuple[ShardRange, Tensor]]]:
    """Return the shards of every parameter and its moments by name in the buffer, in the order of their rows."""
    parts: dict[str, list[tuple[ShardRange, Tensor]]] = {}
    for state in states:
        for spec, (name, tensor) in zip(state.specs, state.tensors(), strict=True):
            if name not in (RNG_CPU, RNG_CUDA):
                parts.setdefault(name, []).append((state.rows_of(spec), tensor))
    return {name: sorted(shards, key=lambda part: part[0].start) for name, shards in parts.items()}


def _copy_rows(target: Tensor, own: ShardRange, parts: Sequence[tuple[ShardRange, Tensor]]) -> None:
    for rows, tensor in parts:
        own_rows, their_rows = own.overlap(rows)
        torch.atleast_1d(target)[own_rows].copy_(torch.atleast_1d(tensor)[their_rows])
