"""All that a learner knows, as one flat buffer and a few counters: what another learner goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from grpo.flat_buffer import TensorSpec, all_finite, buffer_for, lay_out, views
from grpo.types import CheckpointError

MODEL, MOMENTS = "model", ("exp_avg", "exp_avg_sq")  # prefixes of a parameter's name
RNG_CPU, RNG_CUDA = "rng.cpu", "rng.cuda"


@dataclass(frozen=True)
class TrainerState:
    """A learner after `version` steps.

    `buffer` is uint8 [bytes] and holds, by name: `model.<parameter>`, `exp_avg.<parameter>` and
    `exp_avg_sq.<parameter>` in the parameter's shape and dtype (zeros where the optimizer has no moments yet), and the
    states of the random generators, `rng.cpu` and, on a GPU, `rng.cuda`, uint8 [bytes]. Tied parameters appear once.
    `counters` is JSON-able.
    """

    version: int
    specs: tuple[TensorSpec, ...]
    buffer: NDArray[np.uint8]
    counters: Mapping[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views into the buffer by name. Read-only: the buffer may be shared by every process of the node."""
        return views(self.specs, self.buffer)

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters by their own names, as views into the buffer."""
        prefix = f"{MODEL}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors() if name.startswith(prefix)}


class StateWriter:
    """Copies model, optimizer and random generators into a host buffer that is allocated once and reused.

    The optimizer is AdamW without amsgrad. The buffer is allocated by the first `write`: some runs never need it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer
        self._device = next(model.parameters()).device
        self.specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in self._layout())
        self._buffer: NDArray[np.uint8] | None = None

    @torch.no_grad()
    def write(self, version: int, counters: Mapping[str, Any]) -> TrainerState:
        """Snapshot; adds the optimizer's steps by parameter to `counters`. The next call overwrites the buffer."""
        if self._buffer is None:
            self._buffer = buffer_for(self.specs)
        state = TrainerState(version, self.specs, self._buffer, {**counters, "optimizer_steps": self._steps()})
        sources = dict(self._present())
        for name, target in state.tensors():
            if name in sources:
                target.copy_(sources[name])
            else:
                target.zero_()
        return state

    @torch.no_grad()
    def read(self, state: TrainerState) -> None:
        """The inverse of `write`, for a state that `check` has let pass."""
        tensors, steps = dict(state.tensors()), state.counters["optimizer_steps"]
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[f"{MODEL}.{name}"])
            self._optimizer.state.pop(parameter, None)
            if name in steps:
                moments = {kind: torch.empty_like(parameter).copy_(tensors[f"{kind}.{name}"]) for kind in MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(steps[name])), **moments}
        torch.set_rng_state(tensors[RNG_CPU].clone())
        if self._device.type == "cuda" and RNG_CUDA in tensors:
            torch.cuda.set_rng_state(tensors[RNG_CUDA].clone(), self._device)

    def check(self, state: TrainerState) -> None:
        """Raise CheckpointError, naming what differs, for a state of another model or one that is not finite."""
        expected, found = _forms(self.specs), _forms(state.specs)
        if expected != found:
            differing = sorted({name for name, _ in expected.items() ^ found.items()})
            raise CheckpointError(f"the trainer's state does not fit the model; it differs in {differing[:4]}")
        if unknown := sorted(state.counters["optimizer_steps"].keys() - self._parameters.keys()):
            raise CheckpointError(f"the trainer's state counts steps of unknown parameters: {unknown[:4]}")
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


def _forms(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes by name. A run may move between CPU and GPU, so the GPU's generator need not be there."""
    return {spec.name: (spec.shape, spec.dtype) for spec in specs if spec.name != RNG_CUDA}
