"""Training adapters: what has gradients, the model as its own reference, and agreement with the generator."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from grpo.actors.reference import Reference
from grpo.config.actors import LoraConfig, ModelConfig
from grpo.config.schema import RunConfig
from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.errors import CheckpointError
from grpo.learner.batch import make_sample, samples_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.models.lora import adapters_off, add_adapters
from grpo.models.tiny import character_tokenizer
from grpo.types import Batch, Problem, Prompt, SamplingParams
from grpo.weights.adapters import Merge, base_of
from grpo.weights.payload import load_weights, trained_parameters

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def adapted(model):
    """A copy of the model with adapters, zero or random."""

    def make(config=LORA, *, zero=True, dtype=torch.float32):
        copied = copy.deepcopy(model).to(dtype)
        add_adapters(copied, config)
        if not zero:
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in trained_parameters(copied).values():
                    parameter.normal_(0, 0.2, generator=generator)
        return copied

    return make


@pytest.fixture
def make_own_reference(make_learner):
    """A learner with a KL term whose reference is its model with adapters off."""

    def make(of, **settings):
        return make_learner(of, as_reference=partial(adapters_off, of), **({"beta": 0.5} | settings))

    return make


@pytest.fixture
def batch(make_group):
    return Batch([make_group(4, [6, 1, 3], [1.2, -0.7, -0.5], seed=1), make_group(7, [2, 8], [0.9, -0.9], seed=3)])


def after_steps(learner, batch, count=3):
    for _ in range(count):
        metrics = learner.train_step(at_version(batch, learner.version))
    return metrics


def at_version(batch, version):
    def fresh(group):
        completions = [replace(c, versions=((version, len(c.token_ids)),)) for c in group.completions]
        return replace(group, completions=completions, oldest_version=version)

    return Batch([fresh(group) for group in batch.groups])


@pytest.mark.parametrize(
    "settings", [{}, {"packing": "never"}, {"gradient_checkpointing": True}, {"beta": 0.5}], ids=str
)
def test_gradients_are_those_of_the_merged_model_through_the_product(
    model, adapted, make_learner, batch, steps_taken, settings
):
    """dL/dA = scale B' dL/dW and dL/dB = scale dL/dW A', with dL/dW of a learner of all weights."""
    trained, whole = adapted(zero=False), copy.deepcopy(model)
    adapters = trained_parameters(trained)
    base = make_learner(adapted(zero=False)).weights()
    load_weights(whole, Merge(base_of(model), LORA.scale)(base), part=True)
    names = list(dict(whole.named_parameters()))
    before = {name: each.detach().clone() for name, each in adapters.items()}
    if settings.pop("beta", 0):
        groups = reference_by_hand(model, batch)
        make_learner(trained, beta=0.5, as_reference=partial(adapters_off, trained)).train_step(batch)
        make_learner(whole, beta=0.5).train_step(groups)
    else:
        make_learner(trained, **settings).train_step(batch)
        make_learner(whole).train_step(batch)
    found = dict(zip(before, steps_taken[0][0], strict=True))
    of_whole = dict(zip(names, steps_taken[1][0], strict=True))
    for name in before:
        module = name.partition(".lora_")[0]
        a, b = (before[f"{module}.lora_{which}.default.weight"] for which in "AB")
        gradient = of_whole[f"{module}.weight"]
        expected = LORA.scale * (b.T @ gradient if ".lora_A." in name else gradient @ a.T)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)


def reference_by_hand(model, batch):
    def with_reference(group):
        logprobs = TokenLogprobs(copy.deepcopy(model), 1.0).of_samples(samples_of(group), 4096)
        return replace(group, reference_logprobs=logprobs)

    return Batch([with_reference(group) for group in batch.groups])


@pytest.mark.parametrize("packing", ["auto", "never"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kl_is_exactly_zero_before_the_first_step(adapted, make_own_reference, batch, dtype, packing):
    learner = make_own_reference(adapted(dtype=dtype), dtype=dtype, packing=packing, micro_batch_tokens=24)
    assert learner.train_step(batch)["trainer/reference_kl"] == 0
    assert learner.train_step(at_version(batch, 1))["trainer/reference_kl"] > 0


async def test_it_equals_what_a_reference_actor_gives(
    model, adapted, make_learner, make_own_reference, batch, tmp_path
):
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    reference = Reference(RunConfig(model=ModelConfig(path=str(tmp_path))))
    await reference.setup()
    groups = [
        replace(group, reference_logprobs=(await reference.logprobs(group.prompt, group.completions))[0])
        for group in batch.groups
    ]
    await reference.close()
    own = make_own_reference(adapted(zero=False)).train_step(batch)
    given = make_learner(adapted(zero=False), beta=0.5).train_step(Batch(groups))
    assert own["trainer/reference_kl"] == pytest.approx(given["trainer/reference_kl"], rel=1e-5)
    assert own["trainer/grad_norm"] == pytest.approx(given["trainer/grad_norm"], rel=1e-5)
    assert own["loss"] == pytest.approx(given["loss"], rel=1e-5)


def test_the_base_stays_and_is_neither_kept_nor_published(model, adapted, make_learner, batch):
    learner = make_learner(adapted())
    after_steps(learner, batch)
    base = dict(model.named_parameters())
    for name, parameter in learner.model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    names = list(trained_parameters(learner.model))
    assert [spec.name for spec in learner.weights().specs] == names
    kept = [name for name, _ in learner.state().tensors() if not name.startswith("rng.")]
    assert kept == [f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in names]


def test_a_new_learner_goes_on_from_the_adapters_bit_for_bit(adapted, make_own_reference, batch):
    learner, other = make_own_reference(adapted()), make_own_reference(adapted(zero=False))
    after_steps(learner, batch, 2)
    other.restore([copy.deepcopy(learner.state())])
    again = at_version(batch, 2)
    assert other.train_step(again) == learner.train_step(again)
    assert (other.weights().buffer == learner.weights().buffer).all()


def test_adapters_of_another_rank_are_not_gone_on_from(adapted, make_learner):
    state = make_learner(adapted()).state()
    with pytest.raises(CheckpointError, match=r"does not fit the model; it differs in .*lora_A"):
        make_learner(adapted(LoraConfig(rank=2))).restore([state])


async def test_trainer_and_generator_agree_token_by_token(model, adapted, make_learner):
    """The one computes with adapters beside the base, the other with both merged."""
    learner, generator = make_learner(adapted(zero=False)), copy.deepcopy(model)
    engine = TorchEngine(
        generator, stop_token_ids=(1, 2), limits=Limits(9, 12, 9), merge=Merge(base_of(generator), LORA.scale)
    )
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, Problem("?", "!"), rng.integers(3, 60, size=n)) for i, n in enumerate([2, 9, 1, 5])]
    try:
        await engine.update_weights(replace(learner.weights(), version=1))
        groups = await asyncio.gather(
            *(engine.generate(p.token_ids, SamplingParams(n=3, max_tokens=12, seed=p.serial)) for p in prompts)
        )
    finally:
        await engine.close()
    samples = [make_sample(p.token_ids, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    with torch.no_grad():
        trainer_N, _ = TokenLogprobs(learner.model, 1.0)(samples)
        base_N, _ = TokenLogprobs(model, 1.0)(samples)
    behavior_N = torch.tensor(np.concatenate([sample.behavior_logprobs for sample in samples]))
    assert len(behavior_N) > 50
    assert float((trainer_N - behavior_N).abs().max()) < 1e-4
    assert float((base_N - behavior_N).abs().max()) > 0.1
