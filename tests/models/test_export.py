from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from grpo.config.actors import ModelConfig
from grpo.errors import CheckpointError
from grpo.models.export import export_model
from grpo.models.tiny import character_tokenizer, tiny_llama


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "published", tmp_path / "exported"


def publish(model, folder):
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder))


def parameters_of(model):
    return dict(model.named_parameters())


def test_settings_stay_as_the_authors_published_them(folder):
    published = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    assert published.config.resid_pdrop > 0
    source = publish(published, folder[0])
    with torch.no_grad():
        published.transformer.ln_f.weight.add_(1)
    export_model(source, parameters_of(published), torch.float32, folder[1])
    exported = AutoModelForCausalLM.from_pretrained(folder[1])
    assert exported.config.resid_pdrop == published.config.resid_pdrop
    for (name, found), expected in zip(exported.named_parameters(), published.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_generation_config_that_contradicts_itself_is_no_obstacle(folder):
    model = tiny_llama(width=32, layers=1, heads=2)
    source = publish(model, folder[0])
    (folder[0] / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false, "eos_token_id": [1, 7]}'
    )
    export_model(source, parameters_of(model), torch.bfloat16, folder[1])
    exported = GenerationConfig.from_pretrained(folder[1])
    assert (exported.temperature, exported.eos_token_id, exported.do_sample) == (0.6, [1, 7], True)


def test_parameters_of_another_model_are_refused_by_name(folder):
    source = publish(tiny_llama(width=32, layers=1, heads=2), folder[0])
    with pytest.raises(CheckpointError, match=r"differ in \['model\.embed_tokens\.weight'"):
        export_model(source, parameters_of(tiny_llama(width=64, layers=1, heads=2)), torch.float32, folder[1])
    with pytest.raises(CheckpointError, match=r"differ in \['model\.layers\.1"):
        export_model(source, parameters_of(tiny_llama(width=32, layers=2, heads=2)), torch.float32, folder[1])
    assert not folder[1].exists()
