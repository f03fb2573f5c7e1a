"""Loading of Hugging Face tokenizers, and the text of single tokens.

Separate from models/loading.py, since importing models takes a process a second more.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers.decoders import DecodeStream

from grpo.config.actors import ModelConfig
from grpo.types import Completion, EpisodeEnd, Transcript, TurnText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def load_tokenizer(config: ModelConfig, *, text_only: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer at `config.path`.

    `text_only` is for a process that will load no model. Unless transformers is already imported, it is imported
    without torch, and can't load models in this process afterwards.
    """
    with _hidden_torch() if text_only else nullcontext():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def stop_token_ids_of(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what `stop_token_ids` in loading.py does, without the model: that of the tokenizer first."""
    with _hidden_torch():
        from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(config.path).eos_token_id
    except OSError:  # a model without one
        eos = None
    listed = eos if isinstance(eos, list) else [eos]
    return tuple(dict.fromkeys(token for token in [tokenizer.eos_token_id, *listed] if token is not None))


@contextmanager
def _hidden_torch() -> Iterator[None]:
    """Hide torch from transformers, which does not need it here but imports it: 1.5 s of a core for each process.

    None in `sys.modules` tells Python that there is no such module. Does nothing if either library is already loaded,
    for example by the user's task.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    previous = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"  # suppresses the warning that torch is missing
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
        del os.environ[_NO_ADVICE]
        if previous is not None:
            os.environ[_NO_ADVICE] = previous


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> list[str]:
    """Return one text per token, special tokens included; joined they are the whole text.

    A character made of several tokens is attributed to the last one, and the others get "". A character that is never
    completed becomes a replacement character, as in `decode`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python, which can't decode incrementally
        return list(tokenizer.batch_decode([[token_id] for token_id in token_ids]))
    stream, texts, incomplete = DecodeStream(skip_special_tokens=False), [], False
    for token_id in token_ids:
        text = stream.step(backend, token_id)
        incomplete = text is None
        texts.append(text or "")
    if incomplete:
        texts[-1] = "\ufffd"
    return texts


def transcript(tokenizer: PreTrainedTokenizerBase, completion: Completion, ended_by: EpisodeEnd) -> Transcript:
    """Return the texts of an episode's turns. Special tokens are left out, and white space around what was given."""
    counts = [count for turn in completion.turns for count in (turn.sampled, turn.given)]
    parts = np.split(completion.token_ids, np.cumsum(counts)[:-1])
    texts = tokenizer.batch_decode(parts, skip_special_tokens=True)
    return Transcript(
        tuple(
            TurnText(sampled, given.strip(), turn.reward, turn.finish_reason, turn.sampled, turn.given)
            for turn, sampled, given in zip(completion.turns, texts[::2], texts[1::2], strict=True)
        ),
        ended_by,
    )


def tokens_as_json(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> str:
    """Return JSON with a list per completion: its tokens as [text, log-probability, policy version], null if given."""
    lists = [list(_triples(tokenizer, completion)) for completion in completions]
    return json.dumps(lists, ensure_ascii=False, separators=(",", ":"))


def _triples(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> Iterator[tuple[str, Any, Any]]:
    texts = token_texts(tokenizer, completion.token_ids.tolist())
    values: list[tuple[float | None, int | None]] = [(None, None)] * len(texts)
    versions = chain.from_iterable(repeat(version, count) for version, count in completion.versions)
    sampled = zip(completion.sampled_places().tolist(), completion.logprobs.tolist(), versions, strict=True)
    for place, logprob, version in sampled:
        values[place] = round(logprob, 4) if math.isfinite(logprob) else None, version  # JSON has no infinity
    for text, (logprob_or_none, version_or_none) in zip(texts, values, strict=True):
        yield text, logprob_or_none, version_or_none
