"""Loading a tokenizer in a process that computes nothing; texts of single tokens."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from grpo.config.actors import ModelConfig
from grpo.models.loading import load_skeleton, stop_token_ids
from grpo.models.tiny import character_tokenizer
from grpo.models.tokenizer import load_tokenizer, stop_token_ids_of, token_texts, tokens_as_json
from grpo.types import Completion, Turn

PROGRAM = """
import os, sys
from grpo.config.actors import ModelConfig
from grpo.models.tokenizer import load_tokenizer
{before}
print(load_tokenizer(ModelConfig(path={path!r}), text_only=True).encode("dbca>"))
print("torch" in sys.modules, "TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ)
import torch, transformers
print(torch.ones(1).item(), transformers.utils.is_torch_available())
"""


@pytest.mark.parametrize(
    ("before", "with_torch"), [("", False), ("import transformers", True), ("import torch", True)], ids=str
)
def test_text_alone_needs_no_torch_and_takes_it_from_nobody(tiny_model_path, before, with_torch):
    program = PROGRAM.format(before=before, path=tiny_model_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    expected = load_tokenizer(ModelConfig(path=tiny_model_path)).encode("dbca>")
    assert done.stdout.splitlines() == [str(expected), f"{with_torch} False", f"1.0 {with_torch}"]
    assert done.stderr == ""


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


def test_tokens_that_were_given_have_neither_a_logprob_nor_a_version():
    tokenizer = character_tokenizer()
    answer = Completion(
        np.array(tokenizer.encode("12<3")),
        np.array([-0.5, -np.inf, -0.25], np.float32),
        versions=((3, 1), (4, 2)),
        finish_reason="length",
        turns=(Turn(sampled=2, given=1), Turn(sampled=1)),
    )
    plain = Completion(np.array(tokenizer.encode("7")), np.array([-1.0], np.float32), ((4, 1),), "stop")
    assert json.loads(tokens_as_json(tokenizer, [answer, plain])) == [
        [["1", -0.5, 3], ["2", None, 4], ["<", None, None], ["3", -0.25, 4]],
        [["7", -1.0, 4]],
    ]


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, (1,)), (1, (1,)), ([5, 1, 7], (1, 5, 7)), (9, (1, 9))], ids=str
)
def test_stop_tokens_are_those_of_the_tokenizer_then_those_of_the_model(tmp_path, tiny_model_path, listed, expected):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    if listed is not None:
        GenerationConfig(eos_token_id=listed).save_pretrained(tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"))
    tokenizer = load_tokenizer(config)
    assert stop_token_ids_of(config, tokenizer) == expected
    assert set(stop_token_ids(load_skeleton(config), tokenizer)) == set(expected)
