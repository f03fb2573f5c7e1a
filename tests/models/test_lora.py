from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from grpo.config.actors import LoraConfig, ModelConfig
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError
from grpo.models.export import export_adapters, export_merged, merged_model_path
from grpo.models.loading import load_model
from grpo.models.lora import adapted_base, adapters_off, add_adapters, check_targets, load_policy
from grpo.weights.adapters import Merge, base_of
from grpo.weights.payload import WeightsWriter, load_weights, trained_parameters

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])
LORA = LoraConfig(rank=4, alpha=6.0)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def adapted(model, config=LORA, seed=0):
    """With adapters that are not zero."""
    add_adapters(model, config, seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture
def model(tiny_model_path):
    return load_model(ModelConfig(path=tiny_model_path), torch.float32, "cpu")


def test_new_adapters_change_nothing_and_are_all_that_is_trained(model):
    before = logits(model)
    add_adapters(model, LORA)
    assert torch.equal(logits(model), before)
    assert len(trained_parameters(model)) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trained_parameters(model))


def test_the_seed_decides_what_they_are_and_nobody_elses_numbers_change(model, tiny_model_path):
    torch.manual_seed(5)
    add_adapters(model, LORA, seed=3)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    first = trained_parameters(model)
    for seed, same in ((3, True), (4, False)):
        other = load_model(ModelConfig(path=tiny_model_path), torch.float32, "cpu")
        add_adapters(other, LORA, seed=seed)
        pairs = [(t, first[name]) for name, t in trained_parameters(other).items() if ".lora_A." in name]
        assert all(torch.equal(a, b) == same for a, b in pairs)


def test_the_base_is_in_the_models_dtype_and_adapters_in_float32(tiny_model_path):
    config = RunConfig(model=ModelConfig(path=tiny_model_path, dtype="bfloat16"), lora=LORA)
    model = load_policy(config, "cpu")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {p.dtype for p in load_policy(replace(config, lora=LoraConfig()), "cpu").parameters()} == {torch.float32}


def test_switched_off_they_leave_the_base_and_then_are_trained_on(model):
    base = logits(model)
    adapted(model)
    changed, names = logits(model), list(trained_parameters(model))
    with adapters_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)
    assert not torch.allclose(changed, base)
    assert list(trained_parameters(model)) == names


def test_what_generators_merge_computes_what_the_trainer_does(model, tiny_model_path):
    adapted(model)
    generator = load_model(ModelConfig(path=tiny_model_path), torch.float32, "cpu")
    weights = WeightsWriter(model, torch.float32).write(1)
    load_weights(generator, Merge(base_of(generator), LORA.scale)(weights), part=True)
    torch.testing.assert_close(logits(generator), logits(model), rtol=0, atol=1e-5)


def test_only_adapters_are_published_to_the_last_byte(model):
    add_adapters(model, LORA)
    weights = WeightsWriter(model, torch.bfloat16).write(0)
    width, inner, rank = 32, 96, LORA.rank
    pairs = 4 * [(width, width)] + 2 * [(width, inner)] + [(inner, width)]
    assert weights.buffer.nbytes == 2 * 2 * sum(rank * (rows + columns) for rows, columns in pairs)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "nothing"],
            r"'nothing' is not an nn\.Linear of LlamaForCausalLM\. It has down_proj, gate_proj, k_pr",
        ),
        (["embed_tokens"], r"'model\.embed_tokens' is not an nn\.Linear"),
        (["mlp"], r"'model\.layers\.0\.mlp' is not an nn\.Linear"),
        (["lm_head"], r"lm_head shares its weights with another layer"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(model, targets, message):
    with pytest.raises(ConfigError, match=rf"^lora\.target_modules: {message}"):
        check_targets(model, LoraConfig(rank=2, target_modules=targets))


def test_layers_that_are_not_linear_ones_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"all-linear.* GPT2LMHeadModel\. It has none"):
        check_targets(model, LORA)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft, under transformers 5.24
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_peft_loads_what_is_written(model, tiny_model_path, tmp_path, targets):
    config = replace(LORA, target_modules=targets)
    adapted(model, config)
    export_adapters(ModelConfig(path=tiny_model_path), config, trained_parameters(model), tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "adapters")
    assert torch.equal(logits(loaded), logits(model))
    assert adapted_base(ModelConfig(path=str(tmp_path / "adapters"))).path == tiny_model_path


def test_a_merged_folder_is_an_ordinary_model(model, tiny_model_path, tmp_path):
    adapted(model)
    export_adapters(ModelConfig(path=tiny_model_path), LORA, trained_parameters(model), tmp_path / "adapters")
    export_merged(ModelConfig(path=str(tmp_path / "adapters")), torch.float32, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_adapters_as_a_models_path_are_merged_once(model, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapted(model)
    export_adapters(ModelConfig(path=tiny_model_path), LORA, trained_parameters(model), tmp_path / "adapters")
    config = ModelConfig(path=str(tmp_path / "adapters"), dtype="bfloat16")
    path = merged_model_path(config)
    assert merged_model_path(config) == path
    assert [each.name for each in (tmp_path / "cache/grpo").iterdir()] == [path.rpartition("/")[2]]
    assert load_model(ModelConfig(path=path), torch.bfloat16, "cpu").dtype == torch.bfloat16
    assert merged_model_path(ModelConfig(path=tiny_model_path)) == tiny_model_path
