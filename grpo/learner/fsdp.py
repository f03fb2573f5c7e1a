"""The layers of a model: what is sharded, and compiled, one by one."""

# MERGED: A model as one rank holds it: whole where it is alone, rows of every parameter with torch's FSDP2
# where it is not.

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


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Inner ones first, where they are nested."""
    names = {*(model._no_split_modules or ())}
    return [module for module in reversed([*model.modules()]) if type(module).__name__ in names]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Have torch compile what every layer does, with one program for all and for any number of tokens.

    Attention to packed rows is left out: its blocks have other shapes every time.
    """
    from transformers import AttentionInterface

    from grpo.learner.packed_attention import PACKED_ATTENTION, packed_attention

    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Have the backward pass compute every layer again, instead of keeping what it would need.

    After compile_layers: transformers' own checkpointing is part of what is compiled there, where torch gives up on it
    together with all that is in it, as soon as there is anything that it can't compile.
    """
    for layer in layers_of(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


R = TypeVar("R")
_BUCKET = 32 << 20  # elements that a rank sends at a time


class Sharding(Protocol):
    """What the learner knows of where its model is; another backend is one more class with these members.

    `parameters` are this rank's rows of every trained parameter, by name: the float32 masters of an optimizer.
    `rows` says which rows, of those parameters that are not here as a whole.
    """

    parameters: Mapping[str, Tensor]
    rows: Mapping[str, ShardRange]

    def compute(self, function: Callable[[], R]) -> R:
        """What the function returns, which may call the model and its parts. Every rank calls this alike."""

    def with_gradients(self) -> list[Tensor]:
        """Those of `parameters` for which there is a gradient, and have it in `grad`: the sum over all ranks."""

    def weights(self, version: int) -> Weights | None:
        """A snapshot to publish, on rank 0. Raises WeightsError; see WeightsWriter."""


def sharded(model: PreTrainedModel, ranks: Ranks, dtype: torch.dtype) -> Sharding:
    """The model, of which this rank keeps only its part. What is published, and computed by layers, has `dtype`."""
    return Whole(model, dtype) if ranks.size == 1 else FullySharded(model, ranks, dtype)


class Whole:
    """One rank: the model as it is."""

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
    """FSDP2: a layer's parameters are gathered while it computes, in `dtype`; gradients are added up in float32.

    What is outside of the layers (embedding, head, last norm) makes one unit, so that it may be tied, and is computed
    with in float32 as on one rank, under the same autocast. The model may be anywhere: layer by layer its rows move to
    the device that `join` was given.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._ranks, self._dtype, self._device = ranks, dtype, device()
        mesh = init_device_mesh(self._device.type, (ranks.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        root = _Root(model)
        self._root: Any = fully_shard(root, mesh=mesh)
        for module in root.modules():
            if isinstance(module, FSDPModule):  # gradients are added up: the loss has the whole batch's denominator
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        with torch.no_grad():
            self.compute(lambda: None)  # from now on FSDP leaves the rows where they are
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
            self._root.reshard()  # as a backward pass does otherwise: what was gathered may be old by the next one
        return result

    def with_gradients(self) -> list[Tensor]:
        for name, parameter in self._sharded.items():
            if parameter.grad is not None:
                self.parameters[name].grad, parameter.grad = parameter.grad.to_local(), None
        return [rows for rows in self.parameters.values() if rows.grad is not None]

    @torch.no_grad()
    def weights(self, version: int) -> Weights | None:
        """Gathered in buckets: rank 0 has the buffer and one bucket of every rank, but no second model."""
        targets = dict(self._writer.tensors()) if self._writer else {}
        for bucket in self._buckets():
            sent = self._packed(bucket)
            received = [torch.empty_like(sent) for _ in range(self._ranks.size)] if self._writer else None
            distributed.gather(sent, received, dst=0)
            for rank, packed in enumerate(received or []):
                self._unpack(bucket, packed, Ranks(rank, self._ranks.size), targets)
        return self._writer.seal(version) if self._writer else None

    def _buckets(self) -> list[list[str]]:
        """Names of parameters that travel together; a large one travels alone."""
        buckets, room = list[list[str]](), 0
        for name in self._shapes:
            size = self._slot(name)
            if size > room:
                buckets.append([])
                room = _BUCKET
            buckets[-1].append(name)
            room -= size
        return buckets

    def _slot(self, name: str) -> int:
        """Elements that every rank sends of a parameter: as many as the first one has, who has most."""
        shape = self._shapes[name]
        return ShardRange.of(shape, Ranks(0, self._ranks.size)).count * math.prod(shape[1:])

    def _packed(self, bucket: Sequence[str]) -> Tensor:
        """uint8 [bytes]: what this rank has of these parameters, in the dtype to publish."""
        slots = [self._slot(name) for name in bucket]
        packed = torch.zeros(sum(slots), dtype=self._dtype, device=self._device)
        for name, slot in zip(bucket, packed.split(slots), strict=True):
            rows = self.parameters[name]
            slot[: rows.numel()] = rows.flatten()
        return packed.view(torch.uint8)

    def _unpack(self, bucket: Sequence[str], packed: Tensor, ranks: Ranks, targets: Mapping[str, Tensor]) -> None:
        slots = packed.view(self._dtype).split([self._slot(name) for name in bucket])
        for name, slot in zip(bucket, slots, strict=True):
            rows = ShardRange.of(self._shapes[name], ranks)
            target = targets[name][rows.start : rows.stop]
            target.copy_(slot[: target.numel()].view_as(target))


class _Root(nn.Module):
    """Computes anything while all that is outside of the layers is gathered, also what calls parts of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], R]) -> R:
        return function()
