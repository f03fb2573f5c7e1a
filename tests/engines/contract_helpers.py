"""The engine that the contract is tested on: the torch engine or vLLM, as `--engine` says."""

import copy
from contextlib import asynccontextmanager

from engine_helpers import VOCABULARY, lively, weights_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo.engines.torch.engine import TorchEngine
from grpo.models.tiny import tiny_llama
from grpo.weights.payload import parameter_shapes

EOS = 1
BLOCKS = {"torch": 1, "vllm": 32}  # tokens: engines keep prefixes in whole blocks


def tied_llama(seed):
    return lively(tiny_llama(width=64, layers=2, heads=2), seed)


def untied_qwen2(seed):
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=512, eos_token_id=EOS,
    )  # fmt: skip
    return lively(Qwen2ForCausalLM(config), seed)


class Bench:
    """An engine, and the models whose weights it gets: `model(seed)`."""

    def __init__(self, make_model, engine, weight_update, block):
        self.model, self.engine, self.weight_update, self.block = make_model, engine, weight_update, block
        self.used = {}  # version -> model

    def prepare(self, seed):
        """The weights of this seed's model, as the next version. Takes longer than some completions."""
        version = self.engine.version + 1
        self.used[version] = self.model(seed)
        return weights_of(self.used[version], version)

    async def load(self, seed=1):
        """Bring the model of this seed into the engine, under a version of its own."""
        weights = self.prepare(seed)
        await self.engine.update_weights(weights)
        return self.used[weights.version]


@asynccontextmanager
async def opened(kind, make_model, weight_update, limits, folder, *, reuse=True):
    """A Bench. Without `reuse` the engine keeps no prefix: it reads every prompt from its beginning."""
    model, shared = make_model(seed=1), {"limits": limits, "weight_update": weight_update, "threads": 1}
    if kind == "torch":
        megabytes = 64 if reuse else 0
        engine = TorchEngine(copy.deepcopy(model), stop_token_ids=(EOS,), prefix_cache_mb=megabytes, **shared)
    else:
        from grpo.engines.vllm.engine import VLLMEngine

        model.save_pretrained(folder)
        settings = {"dtype": "float32", "block_size": BLOCKS[kind], "enable_prefix_caching": reuse}
        engine = await VLLMEngine(
            str(folder), stop_token_ids=(EOS,), shapes=parameter_shapes(model), settings=settings, **shared
        ).start()
    try:
        yield Bench(make_model, engine, weight_update, BLOCKS[kind])
    finally:
        await engine.close()
