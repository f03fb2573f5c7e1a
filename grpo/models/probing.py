"""Checks of whether a model's attention can be replaced by an equivalent computation."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative to the logits' norm; a real mismatch is far larger
_TOLERANCE_16_BIT = 0.05


def full_attention_blocker(model: Any, attention: Collection[str] = ("sdpa",)) -> str | None:
    """Return why a token of this model does not attend to all tokens before it, or None if it does.

    Reads the config, since a short trial would not reveal a window. `attention` lists the implementations that may be
    replaced.
    """
    settings = model.config.get_text_config()
    kinds = {*(getattr(settings, "layer_types", None) or ())} - {"full_attention"}
    if kinds or model._is_stateful:
        return f"it has layers of {', '.join(sorted(kinds)) or 'a recurrent state'}"
    if getattr(settings, "sliding_window", None) and getattr(settings, "use_sliding_window", True):
        return "it has sliding-window attention"
    if model.config._attn_implementation not in attention:
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    return None


def logits_mismatch(actual: Tensor, expected: Tensor) -> str | None:
    """Return by how much logits differ from the expected ones, or None if the difference is rounding."""
    tolerance = _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BIT)
    gap = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return f"off by {gap:.1%}" if gap > tolerance else None
