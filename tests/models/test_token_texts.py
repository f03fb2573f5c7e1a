import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.models.tokenizer import token_texts


@pytest.fixture(scope="module")
def bytewise():
    """A token for each byte, so that most characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_a_character_stands_at_the_last_of_its_tokens(bytewise):
    token_ids = [*bytewise.encode("a ü🙂"), bytewise.eos_token_id]
    assert token_texts(bytewise, token_ids) == ["a", " ", "", "ü", "", "", "", "🙂", "<eos>"]


def test_a_character_that_is_cut_off_or_broken_is_told_once(bytewise):
    smile = bytewise.encode("🙂")
    for token_ids in (bytewise.encode("a") + smile[:2], smile[1:3] + bytewise.encode("a")):
        texts = token_texts(bytewise, token_ids)
        assert len(texts) == len(token_ids)
        assert "".join(texts).replace("\ufffd", "") == "a"
        assert "\ufffd" in "".join(texts)


def test_a_tokenizer_without_a_stream_goes_one_by_one():
    class Slow:
        def batch_decode(self, sequences):
            return [f"<{token_id}>" for (token_id,) in sequences]

    assert token_texts(Slow(), [3, 5]) == ["<3>", "<5>"]
