"""Loading ordinary Hugging Face tokenizers; apart from models, whose imports take a second more per process."""

# MERGED: What each token adds to a text, and a completion token by token.

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from grpo.config.actors import ModelConfig
from grpo.types import Completion

if TYPE_CHECKING:
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


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> list[str]:
    """One text for each token, special ones included; joined, they are the whole.

    A character may be made of several tokens: it stands at the last of them, and "" at the others. One that is never
    completed is a replacement character, as `decode` has it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python, which knows no other way than one by one
        return list(tokenizer.batch_decode([[token_id] for token_id in token_ids]))
    return list(_streamed(backend, token_ids))


def tokens_as_json(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> str:
    """A list for each completion: its tokens as [text, log-probability, policy version]."""
    lists = [list(_triples(tokenizer, completion)) for completion in completions]
    return json.dumps(lists, ensure_ascii=False, separators=(",", ":"))


def _triples(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> Iterator[tuple[str, float | None, int]]:
    versions = chain.from_iterable(repeat(version, count) for version, count in completion.versions)
    texts = token_texts(tokenizer, completion.token_ids.tolist())
    for text, logprob, version in zip(texts, completion.logprobs.tolist(), versions, strict=True):
        yield text, round(logprob, 4) if math.isfinite(logprob) else None, version  # JSON knows no infinity


def _streamed(backend: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    stream, held_back = DecodeStream(skip_special_tokens=False), False
    for token_id in token_ids:
        if held_back:
            yield ""
        text = stream.step(backend, token_id)
        held_back = text is None
        if text is not None:
            yield text
    if held_back:
        yield "\ufffd"
