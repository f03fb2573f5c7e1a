from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import load_file
from transformers import BioGptConfig, BioGptForCausalLM, BloomConfig, GPT2Config, GPT2LMHeadModel

from grpo.config.actors import ModelConfig
from grpo.errors import ConfigError
from grpo.models.loading import (
    cache_folder,
    cached,
    check_weights,
    context_length,
    load_model,
    load_settings,
    load_skeleton,
    stop_token_ids,
)
from grpo.models.tiny import character_tokenizer, tiny_llama
from grpo.models.tokenizer import load_tokenizer

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
            attn_pdrop=0.5,
        )
    )


def biogpt():
    return BioGptForCausalLM(
        BioGptConfig(
            vocab_size=40,
            max_position_embeddings=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_dropout_prob=0.5,
            attention_probs_dropout_prob=0.5,
        )
    )


@pytest.mark.parametrize("make", [gpt2, biogpt])
def test_a_loaded_model_has_no_dropout_in_training_mode_either(tmp_path, make):
    made = make().train()
    with torch.no_grad():
        assert not torch.equal(made(TOKENS).logits, made(TOKENS).logits)
    made.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path)), torch.float32, "cpu")
    with torch.no_grad():
        expected = made.eval()(TOKENS).logits
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, expected)
        torch.testing.assert_close(loaded.train()(TOKENS).logits, expected)


@pytest.fixture
def folder(tmp_path):
    tiny_llama(width=32, layers=2, heads=2).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    return ModelConfig(path=str(tmp_path))


def test_a_saved_tiny_model_loads_as_it_was(folder):
    model, saved = load_model(folder, torch.float32, "cpu"), tiny_llama(width=32, layers=2, heads=2)
    assert not model.training
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in saved.named_parameters()}
    for (name, a), b in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert load_tokenizer(folder).get_vocab() == character_tokenizer().get_vocab()


def test_the_dtype_is_the_one_asked_for(folder):
    assert {p.dtype for p in load_model(folder, torch.bfloat16, "cpu").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("asked", "got"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_attention_is_the_one_asked_for(folder, asked, got):
    config = replace(folder, attention=asked)
    assert load_model(config, torch.float32, "cpu").config._attn_implementation == got
    assert load_skeleton(config).config._attn_implementation == got


@pytest.mark.parametrize(
    ("generation_eos", "tokenizer_eos", "expected"),
    [
        (1, "<eos>", (1,)),
        ([7, 1], "<eos>", (1, 7)),
        (2, "<eos>", (1, 2)),
        (None, "<eos>", (1,)),
        ([7, 2], None, (2, 7)),
    ],
)
def test_every_end_of_sequence_token_is_found(generation_eos, tokenizer_eos, expected):
    model, tokenizer = tiny_llama(width=32, layers=1, heads=2), character_tokenizer()
    model.generation_config.eos_token_id = generation_eos
    tokenizer.eos_token = tokenizer_eos
    assert stop_token_ids(model, tokenizer) == expected


def test_end_of_sequence_tokens_survive_the_folder(folder):
    assert stop_token_ids(load_model(folder, torch.float32, "cpu"), load_tokenizer(folder)) == (1,)


class Payload:
    """What a pickle may do when it is loaded."""

    def __reduce__(self):
        return print, ("code from a file",)


@pytest.fixture
def pickled(folder):
    """The same model as a folder of an older kind."""
    path = Path(folder.path)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    return folder


def test_pickled_weights_have_to_be_asked_for(pickled):
    with pytest.raises(ConfigError, match=r"^model\.allow_pickle: .* has no safetensors; set it to true"):
        check_weights(pickled)
    with pytest.raises(OSError, match=r"safetensors"):
        load_model(pickled, torch.float32, "cpu")
    asked = replace(pickled, allow_pickle=True)
    check_weights(asked)
    model, saved = load_model(asked, torch.float32, "cpu"), tiny_llama(width=32, layers=2, heads=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


def test_pickled_weights_bring_no_code(pickled, capsys):
    file = Path(pickled.path, "pytorch_model.bin")
    torch.save(torch.load(file) | {"extra": Payload()}, file)
    with pytest.raises(UnpicklingError):
        load_model(replace(pickled, allow_pickle=True), torch.float32, "cpu")
    assert "code from a file" not in capsys.readouterr().out


@pytest.mark.parametrize("shard_size", ["10GB", "10KB"])
def test_safetensors_are_found_whole_or_in_shards(tmp_path, shard_size):
    tiny_llama(width=32, layers=2, heads=2).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    check_weights(ModelConfig(path=str(tmp_path)))


def test_the_context_is_the_architectures_limit(folder):
    assert context_length(load_settings(folder)) == 512
    assert context_length(GPT2Config(n_positions=16)) == 16
    assert context_length(BloomConfig()) is None


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def write(text):
    return lambda folder: (folder / "config.json").write_text(text)


def test_a_model_is_made_once():
    folder = cached("m", write("first"))
    assert cached("m", write("second")) == folder == cache_folder() / "m"
    assert (folder / "config.json").read_text() == "first"
    assert cached("other", write("second")) != folder


def test_one_that_fails_leaves_nothing_behind():
    def fail(folder):
        write("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("m", fail)
    assert list(cache_folder().iterdir()) == []


def test_of_two_at_once_the_first_wins():
    def overtaken(folder):
        cached("m", write("theirs"))
        write("ours")(folder)

    folder = cached("m", overtaken)
    assert (folder / "config.json").read_text() == "theirs"
    assert list(cache_folder().iterdir()) == [folder]


def test_a_folder_that_cannot_be_put_in_place_is_an_error():
    def vanishing(folder):
        folder.rmdir()

    with pytest.raises(FileNotFoundError):
        cached("m", vanishing)


def test_without_xdg_the_cache_lies_in_the_home_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(os.path.expanduser("~")) / ".cache" / "grpo"
