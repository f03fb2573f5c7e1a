"""Which models attend to everything before a token, in a way that can be computed otherwise."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the logits' size; what is wrong is wrong by more
_ROUNDED = 0.05  # with 16 bits


def full_attention_blocker(model: Any, attention: Collection[str] = ("sdpa",)) -> str | None:
    """What the config of a transformers model says against it; a short trial would not show a window.

    `attention` names the implementations that compute it in the way that is to be replaced.
    """
    settings = model.config.get_text_config()
    kinds = {*(getattr(settings, "layer_types", None) or ())} - {"full_attention"}
    if kinds or model._is_stateful:
        return f"it has layers of {', '.join(sorted(kinds)) or 'a recurrent state'}"
    if getattr(settings, "sliding_window", None) and getattr(settings, "use_sliding_window", True):
        return "its attention slides"
    if model.config._attn_implementation not in attention:
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    return None


def logits_mismatch(found: Tensor, expected: Tensor) -> str | None:
    """By how much logits differ from those of the usual way, where that is more than rounding."""
    tolerance = _TOLERANCE.get(expected.dtype, _ROUNDED)
    gap = float((found.double() - expected.double()).norm() / expected.double().norm())
    return f"off by {gap:.1%}" if gap > tolerance else None
