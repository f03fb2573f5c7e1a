"""Any causal LM: loaded from a folder, sampled from, trained on what it said, and published back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3Config,
    TrOCRConfig,
)

from grpo.checkpoint.trainer_state import Parameters
from grpo.config.actors import ModelConfig, TrainerConfig
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.errors import ConfigError
from grpo.learner.batch import samples_of
from grpo.learner.learner import Learner
from grpo.learner.logprobs import TokenLogprobs
from grpo.learner.objective import Objective
from grpo.models.export import export_model
from grpo.models.loading import check_architecture, load_model, load_skeleton, stop_token_ids
from grpo.models.tiny import character_tokenizer
from grpo.models.tokenizer import load_tokenizer
from grpo.types import Batch, Group, Problem, Prompt, SamplingParams

EOS, TURN_END = 1, 7
PROMPT_LENGTHS = (3, 9)
SMALL = {
    "vocab_size": 79,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": EOS,
}


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


CONFIGS = {
    "llama, tied, several eos": LlamaConfig(**SMALL | {"eos_token_id": [EOS, TURN_END]}, tie_word_embeddings=True),
    "qwen2, untied, biases": Qwen2Config(**without(SMALL, "head_dim"), tie_word_embeddings=False),
    "qwen3, norms of queries and keys": Qwen3Config(**SMALL),
    "mistral, sliding window": MistralConfig(**SMALL, sliding_window=4),
    "gemma2, every other layer slides, capped logits": Gemma2Config(**SMALL, sliding_window=4),
    "gpt_neox, rotates a part": GPTNeoXConfig(**without(SMALL, "num_key_value_heads", "head_dim")),
    "gpt2, absolute positions, no pad": GPT2Config(
        vocab_size=79, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=EOS, eos_token_id=EOS
    ),
    "bloom, alibi": BloomConfig(vocab_size=79, hidden_size=32, n_layer=2, n_head=4, eos_token_id=EOS, pad_token_id=0),
    "mpt, alibi": MptConfig(vocab_size=79, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, eos_token_id=EOS),
    "llama, pad is eos": LlamaConfig(**SMALL | {"pad_token_id": EOS}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request, tmp_path):
    """A random model, lively enough that every token depends on the whole prefix, and a tokenizer in a folder."""
    model = AutoModelForCausalLM.from_config(request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
    model.save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = {None: None, 0: "<pad>", EOS: "<eos>"}[request.param.pad_token_id]
    tokenizer.save_pretrained(tmp_path)
    return ModelConfig(path=str(tmp_path))


@dataclass
class Parts:
    engine: TorchEngine
    learner: Learner
    stops: tuple[int, ...]


@contextlib.asynccontextmanager
async def parts_of(config):
    model = load_model(config, torch.float32, "cpu")
    stops = stop_token_ids(model, load_tokenizer(config))
    trainer, objective = TrainerConfig(lr=1e-2, micro_batch_tokens=64), Objective(LossConfig(), CorrectionConfig())
    learner = Learner(load_model(config, torch.float32, "cpu"), trainer, objective, temperature=1.0, age_bound=0)
    engine = TorchEngine(model, stop_token_ids=stops, limits=Limits(16, 20, 8), threads=1)
    try:
        yield Parts(engine, learner, stops)
    finally:
        await engine.close()


def prompt_of(length):
    return Prompt(length, Problem("?", "!"), np.random.default_rng(length).integers(10, 79, size=length))


async def group_of(engine, length):
    prompt = prompt_of(length)
    completions = await engine.generate(prompt.token_ids, SamplingParams(n=3, max_tokens=20, seed=length))
    return Group(prompt, completions, None, (1.0, 0.5, 0.0), (1.0, 0.1, -1.0), oldest_version=0)


@torch.no_grad()
def expected(model, prompt, stops):
    ids_1T = torch.tensor(prompt.token_ids)[None]
    output_1T = model.eval().generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=list(stops),
        pad_token_id=0,
    )
    return output_1T[0, ids_1T.shape[1] :].tolist()


async def greedy(engine, prompt):
    (completion,) = await engine.generate(prompt.token_ids, SamplingParams(temperature=0.0, max_tokens=20))
    return completion.token_ids.tolist()


async def test_sampled_trained_on_and_published_back(config):
    check_architecture(load_skeleton(config), "torch")
    prompts = [prompt_of(length) for length in PROMPT_LENGTHS]
    async with parts_of(config) as parts:
        said = [await greedy(parts.engine, prompt) for prompt in prompts]
        assert said == [expected(parts.learner.model, prompt, parts.stops) for prompt in prompts]

        parts.learner.model.train()
        groups = [await group_of(parts.engine, length) for length in PROMPT_LENGTHS]
        samples = [sample for group in groups for sample in samples_of(group)]
        found = TokenLogprobs(parts.learner.model, 1.0).of_samples(samples, 64)
        for sample, logprobs_T in zip(samples, found, strict=True):
            np.testing.assert_allclose(logprobs_T, sample.behavior_logprobs, rtol=0, atol=1e-4)
        assert parts.learner.train_step(Batch(groups))["mismatch/logprob_abs_diff_same_version"] < 1e-4

        await parts.engine.update_weights(parts.learner.weights())
        assert parts.engine.version == 1
        updated = [await greedy(parts.engine, prompt) for prompt in prompts]
        assert updated == [expected(parts.learner.model, prompt, parts.stops) for prompt in prompts]
        assert updated != said


async def test_trained_on_and_exported(config, tmp_path):
    async with parts_of(config) as parts:
        parts.learner.train_step(Batch([await group_of(parts.engine, length) for length in PROMPT_LENGTHS]))
    export_model(config, Parameters([parts.learner.state()]), torch.float32, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokens_1T = torch.tensor(prompt_of(9).token_ids)[None]
    with torch.no_grad():
        assert torch.equal(exported(tokens_1T).logits, parts.learner.model.eval()(tokens_1T).logits)


async def test_every_eos_token_ends_a_completion_and_is_kept(config):
    params = SamplingParams(n=8, temperature=3.0, max_tokens=20)  # hot enough for every token to have its turn
    async with parts_of(config) as parts:
        groups = [await parts.engine.generate(prompt_of(length).token_ids, params) for length in range(2, 12)]
    ends = set()
    for completion in (completion for group in groups for completion in group):
        inner, last = completion.token_ids[:-1], int(completion.token_ids[-1])
        assert not set(inner) & set(parts.stops)
        assert (completion.finish_reason == "stop") == (last in parts.stops)
        ends |= {last} & set(parts.stops)
    assert ends == set(parts.stops)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (MambaConfig(vocab_size=79, hidden_size=16, state_size=4, num_hidden_layers=1), "MambaForCausalLM"),
        (BartConfig(vocab_size=79, d_model=16, decoder_layers=1, decoder_attention_heads=2), "BartForCausalLM"),
    ],
)
def test_what_the_torch_engine_would_get_wrong_is_refused(settings, name):
    model = AutoModelForCausalLM.from_config(settings)
    with pytest.raises(ConfigError, match=rf"^generator\.engine: the torch engine can't run {name}, .*vllm"):
        check_architecture(model, "torch")
    check_architecture(model, "vllm")


def test_what_the_learner_would_get_wrong_is_refused():
    model = AutoModelForCausalLM.from_config(TrOCRConfig(vocab_size=79, d_model=16, decoder_layers=1))
    with pytest.raises(ConfigError, match=r"^model\.path: TrOCRForCausalLM can't be trained"):
        check_architecture(model, "vllm")
