"""What each token adds to a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> list[str]:
    """One text for each token, special ones included; joined, they are the whole.

    A character may be made of several tokens: it stands at the last of them, and "" at the others. One that is never
    completed is a replacement character, as `decode` has it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python, which knows no other way than one by one
        return list(tokenizer.batch_decode([[token_id] for token_id in token_ids]))
    return list(_streamed(backend, token_ids))


def _streamed(backend: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    stream, held_back = DecodeStream(skip_special_tokens=False), False
    for token_id in token_ids:
        if held_back:
            yield ""
        text = stream.step(backend, int(token_id))
        held_back = text is None
        if text is not None:
            yield text
    if held_back:
        yield "\ufffd"
