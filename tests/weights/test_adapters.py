"""Merging published adapters, against W + scale * B A in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from grpo.errors import WeightsError
from grpo.models.tiny import tiny_llama
from grpo.weights.adapters import Merge, base_of
from grpo.weights.flat_buffer import buffer_for, lay_out, views
from grpo.weights.payload import Weights, load_weights

SCALE, RANK = 0.7, 3


def published(tensors, version=1):
    specs = lay_out((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
    buffer = buffer_for(specs)
    for name, target in views(specs, buffer):
        target.copy_(tensors[name])
    return Weights(version, specs, buffer)


def adapters_of(model, endings, seed=0, dtype=torch.float32):
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith(endings):
            rows, columns = module.weight.shape
            found[f"{name}.lora_A.default.weight"] = torch.randn(RANK, columns, generator=generator).to(dtype)
            found[f"{name}.lora_B.default.weight"] = torch.randn(rows, RANK, generator=generator).to(dtype)
    return found


def expected(base, adapters, name):
    module = name.removesuffix("weight")
    a, b = (adapters[f"{module}lora_{which}.default.weight"].double() for which in "AB")
    return base[name].double() + SCALE * b @ a


@pytest.fixture
def model():
    return tiny_llama(width=16, layers=2, heads=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_the_adapted_matrices_are_the_base_plus_the_product(model, dtype, tolerance):
    model.to(dtype)
    adapters = adapters_of(model, ("q_proj", "down_proj"), dtype=dtype)
    base = base_of(model)
    merged = dict(Merge(base, SCALE)(published(adapters)).tensors())
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert {name.split(".", 3)[-1] for name in changed} == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    for name in changed:
        torch.testing.assert_close(merged[name].double(), expected(base, adapters, name), rtol=tolerance, atol=1e-5)
        assert merged[name].dtype == dtype


def test_the_blocks_of_adapted_matrices_come_whole_and_no_others(model):
    merged = Merge(base_of(model), SCALE)(published(adapters_of(model, "layers.1.self_attn.v_proj")))
    assert [spec.name for spec in merged.specs] == [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]


def test_versions_do_not_add_up(model):
    """The base stays what it was while the model it came from computes with other weights."""
    merge, adapters = Merge(base_of(model), SCALE), published(adapters_of(model, "proj"))
    once = merge(adapters)
    for seed in range(3):
        load_weights(model, merge(published(adapters_of(model, "proj", seed=seed))), part=True)
    assert (merge(adapters).buffer == once.buffer).all()


def test_adapters_of_zero_are_the_base_bit_for_bit(model):
    adapters = {n: t * ("lora_A" in n) for n, t in adapters_of(model, "proj").items()}
    base = base_of(model)
    assert all(torch.equal(tensor, base[name]) for name, tensor in Merge(base, SCALE)(published(adapters)).tensors())


def test_nobody_writes_to_what_was_merged_and_the_version_stays(model):
    merged = Merge(base_of(model), SCALE)(published(adapters_of(model, "proj"), version=7))
    assert merged.version == 7
    assert not merged.buffer.flags.writeable


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.lora_A.default.weight"), "q_proj.lora_B"),
        (lambda tensors: tensors.update({"model.layers.9.x.lora_A.default.weight": torch.zeros(3, 16)}), "layers.9"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}), "model.norm.weight"),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.q_proj.lora_B.default.weight": torch.zeros(8, 3)}
            ),
            "q_proj.lora_A",
        ),
        (dict.clear, r"\[\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, change, named):
    adapters = adapters_of(model, "q_proj")
    change(adapters)
    with pytest.raises(WeightsError, match=f"version 1 are no adapters of the model; it differs in .*{named}"):
        Merge(base_of(model), SCALE)(published(adapters))


def test_whole_models_are_refused(model):
    weights = published(base_of(model))
    with pytest.raises(WeightsError, match="no adapters"):
        Merge(base_of(model), SCALE).check_fit(dataclasses.replace(weights, version=2))
