"""Episodes as people read them."""

import numpy as np

from grpo.models.tiny import character_tokenizer
from grpo.models.tokenizer import transcript
from grpo.types import Completion, Transcript, Turn, TurnText


def test_a_transcript_has_the_texts_of_each_turn_without_special_tokens():
    tokenizer = character_tokenizer()
    given = tokenizer.encode(" < ")
    token_ids = np.array([*tokenizer.encode("16<eos>"), *given, *tokenizer.encode("8"), *tokenizer.encode("4<eos>")])
    turns = (Turn(3, len(given)), Turn(1, finish_reason="length"), Turn(2, reward=1.0))
    completion = Completion(token_ids, np.zeros(6, np.float32), ((0, 6),), "stop", turns)
    found = transcript(tokenizer, completion, "done")
    assert found == Transcript(
        (
            TurnText("16", "<", 0.0, "stop", 3, 3),
            TurnText("8", "", 0.0, "length", 1, 0),
            TurnText("4", "", 1.0, "stop", 2, 0),
        ),
        "done",
    )
    assert str(found) == "16\n| <\n8\n4"
