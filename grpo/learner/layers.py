"""The layers of a model: what is sharded, and compiled, one by one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:  # the module behind it takes a second to import
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

    from grpo.learner.attention import PACKED_ATTENTION, packed_attention

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
