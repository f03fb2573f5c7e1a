"""Sharding of the trained model over ranks with torch's FSDP2, and what is done to each of its layers.

With one rank the model stays whole. With several, each rank keeps some rows of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from grpo.utils.ranks import Ranks, ShardRange, device
from grpo.weights.payload import Weights, WeightsWriter, trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


R = TypeVar("R")
_BUCKET = 32 << 20  # elements that a rank sends at a time when weights are gathered


class Sharding(Protocol):
    """Interface of the learner to a model that may be sharded; another backend is one more class with these members.

    `parameters` are this rank's rows of every trained parameter, by name: the float32 master weights of an optimizer.
    `rows` has the row range of each parameter of which this rank holds only a part.
    """

    parameters: Mapping[str, Tensor]
    rows: Mapping[str, ShardRange]

    def compute(self, function: Callable[[], R]) -> R:
        """Call a function that uses the model or its parts. Every rank has to make the same calls."""

    def with_gradients(self) -> list[Tensor]:
        """Return the `parameters` that have a gradient, with the sum over all ranks in `grad`."""

    def weights(self, version: int) -> Weights | None:
        """Write a snapshot to publish; None on ranks other than 0. Raises WeightsError; see WeightsWriter."""


def shard(model: PreTrainedModel, ranks: Ranks, dtype: torch.dtype) -> Sharding:
    """Keep only this rank's part of the model. Layers compute, and weights are published, in `dtype`."""
    return Unsharded(model, dtype) if ranks.size == 1 else FullySharded(model, ranks, dtype)


class Unsharded:
    """Sharding of one rank, which holds the whole model."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.parameters: Mapping[str, Tensor] = trained_parameters(model)
        self.rows: Mapping[str, ShardRange] = {}
        self._writer = WeightsWriter(model, dtype)

    def compute(self, function: Callable[[], R]) -> R:
        return function()

    def with_gradients(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters.values() if parameter.grad is not None]

    def weights(self, version: int) -> Weights | None:
        return self._writer.write(version)


class FullySharded:
    """Sharding with FSDP2: a layer's parameters are gathered in `dtype` while it computes; gradients sum in float32.

    Everything outside of the layers (embedding, head, last norm) makes one unit, so that it may be tied. It is gathered
    in float32 and computes under the same autocast as on one rank. The model may start on any device: layer by layer
    its rows move to the device that `join` was given.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._ranks, self._dtype, self._device = ranks, dtype, device()
        # A layer is a unit of FSDP. The root unit holds the rest, and gathers it during any function that is computed.
        mesh = init_device_mesh(self._device.type, (ranks.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        root = _Root(model)
        self._root: Any = fully_shard(root, mesh=mesh)
        for module in root.modules():
            if isinstance(module, FSDPModule):  # sum, not mean: the loss has the whole batch's denominator
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        with torch.no_grad():
            self.compute(lambda: None)  # FSDP's lazy initialization: from now on the rows' storage stays

        # Rows as plain tensors: the optimizer and the snapshots know nothing of FSDP.
        self._sharded: dict[str, Any] = {**trained_parameters(model)}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._sharded.items()}
        self.parameters: Mapping[str, Tensor] = {
            name: parameter.to_local().detach() for name, parameter in self._sharded.items()
        }
        self.rows: Mapping[str, ShardRange] = {
            name: ShardRange.of(shape, ranks) for name, shape in self._shapes.items()
        }
        self._writer = WeightsWriter(model, dtype) if ranks.rank == 0 else None

    def compute(self, function: Callable[[], R]) -> R:
        result: R = self._root(function)
        if not torch.is_grad_enabled():
            self._root.reshard()  # normally done by the backward pass; gathered values would be stale in the next call
        return result

    def with_gradients(self) -> list[Tensor]:
        for name, parameter in self._sharded.items():
            if parameter.grad is not None:
                self.parameters[name].grad, parameter.grad = parameter.grad.to_local(), None
        return [rows for rows in self.parameters.values() if rows.grad is not None]

    @torch.no_grad()
    def weights(self, version: int) -> Weights | None:
        """Gather in buckets: rank 0 needs its buffer and one bucket of every rank, but no second model."""
        targets = dict(self._writer.tensors()) if self._writer else {}
        for bucket in self._buckets():
            sent = self._pack(bucket)
            received = [torch.empty_like(sent) for _ in range(self._ranks.size)] if self._writer else None
            distributed.gather(sent, received, dst=0)
            for rank, packed in enumerate(received or []):
                self._unpack(bucket, packed, Ranks(rank, self._ranks.size), targets)
        return self._writer.seal(version) if self._writer else None

    def _buckets(self) -> list[list[str]]:
        """Group parameter names into buckets that are sent together; a large parameter makes one by itself."""
        buckets, free = list[list[str]](), 0
        for name in self._shapes:
            size = self._slot(name)
            if size > free:
                buckets.append([])
                free = _BUCKET
            buckets[-1].append(name)
            free -= size
        return buckets

    def _slot(self, name: str) -> int:
        """Return the elements that every rank sends of a parameter: as many as rank 0 holds, which holds most."""
        shape = self._shapes[name]
        return ShardRange.of(shape, Ranks(0, self._ranks.size)).count * math.prod(shape[1:])

    def _pack(self, bucket: Sequence[str]) -> Tensor:
        """uint8 [bytes]: this rank's rows of these parameters, in the dtype to publish."""
        slots = [self._slot(name) for name in bucket]
        packed = torch.zeros(sum(slots), dtype=self._dtype, device=self._device)
        for name, slot in zip(bucket, packed.split(slots), strict=True):
            rows = self.parameters[name]
            slot[: rows.numel()] = rows.flatten()
        return packed.view(torch.uint8)

    def _unpack(self, bucket: Sequence[str], packed: Tensor, ranks: Ranks, targets: Mapping[str, Tensor]) -> None:
        """Copy the rows that one rank sent to their place in the whole tensors."""
        slots = packed.view(self._dtype).split([self._slot(name) for name in bucket])
        for name, slot in zip(bucket, slots, strict=True):
            rows = ShardRange.of(self._shapes[name], ranks)
            target = targets[name][rows.start : rows.stop]
            target.copy_(slot[: target.numel()].view_as(target))


class _Root(nn.Module):
    """Root unit of FSDP: gathers the parameters outside of the layers while any function of the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], R]) -> R:
        return function()


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model; where they are nested, inner ones first."""
    names = {*(model._no_split_modules or ())}
    return [module for module in reversed([*model.modules()]) if type(module).__name__ in names]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile every layer with torch.compile: one program for all layers and any number of tokens.

    Packed attention stays uncompiled, since the shapes of its blocks change every time.
    """
    from transformers import AttentionInterface

    from grpo.learner.packed_attention import PACKED_ATTENTION, packed_attention

    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute every layer in the backward pass instead of keeping its activations.

    Call it after compile_layers. transformers' own checkpointing would be inside the compiled function, and one graph
    break there makes torch run the whole layer uncompiled.
    """
    for layer in layers_of(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
