"""Which models attend to everything before a token, in a way that can be computed otherwise."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def why_not_full_attention(model: Any, attention: Collection[str] = ("sdpa",)) -> str | None:
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
