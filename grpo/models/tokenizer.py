"""Loading ordinary Hugging Face tokenizers; apart from models, whose imports take a second more per process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from grpo.config import ModelConfig

if TYPE_CHECKING:  # see below
    from transformers import PreTrainedTokenizerBase

_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def load_tokenizer(config: ModelConfig, *, text_only: bool = False) -> PreTrainedTokenizerBase:
    """`text_only` is for a process that will load no model: one that has not imported transformers yet does it without
    torch, and transformers can't load models in it afterwards."""
    with _torch_left_out() if text_only else nullcontext():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


@contextmanager
def _torch_left_out() -> Iterator[None]:
    """transformers does without torch, but imports it where it finds it: 1.5 s of a core for each process.

    None in `sys.modules` is how Python is told that there is no such module. Who has loaded one of the two has done so
    for a reason, the task of a user for example.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    said = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"  # that there is no torch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
        del os.environ[_NO_ADVICE]
        if said is not None:
            os.environ[_NO_ADVICE] = said
