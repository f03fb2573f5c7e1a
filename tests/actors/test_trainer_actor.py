from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.actors.trainer import Trainer
from grpo.config.actors import ModelConfig
from grpo.errors import StalenessError, TransferError, WeightsError
from grpo.learner.batch import samples_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.models.loading import load_model
from grpo.models.tiny import tiny_llama
from grpo.types import Batch
from grpo.weights.broadcast import BroadcastGroup


@pytest.fixture
def make_trainer(config):
    opened = []

    async def make(**changes):
        trainer = Trainer(replace(config, **changes))
        await trainer.setup()
        opened.append(trainer)
        return trainer

    yield make
    for trainer in opened:
        trainer._thread.close()


def initial_weights(config):
    return dict(load_model(config.model, torch.float32, "cpu").named_parameters())


async def test_the_first_weights_are_version_0_as_loaded(make_trainer, config):
    weights, version = await (await make_trainer()).push_weights()
    assert version == weights.version == 0
    initial = initial_weights(config)
    assert {name for name, _ in weights.tensors()} == set(initial)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in weights.tensors())


async def test_a_step_makes_version_1_with_other_weights(make_trainer, config, make_group):
    trainer = await make_trainer()
    metrics = await trainer.train_step(Batch([make_group()]))
    weights, version = await trainer.push_weights()
    assert version == weights.version == 1
    assert metrics["trainer/grad_norm"] > 0
    assert metrics["trainer/lr"] == config.trainer.lr
    initial = initial_weights(config)
    assert not any(torch.equal(tensor, initial[name]) for name, tensor in weights.tensors())


async def test_what_was_written_is_there_until_it_is_written_anew(make_trainer, make_group):
    trainer = await make_trainer()
    assert await trainer.written_weights() == (None, None)
    header = await trainer.write_weights()
    await trainer.train_step(Batch([make_group()]))
    weights, version = await trainer.written_weights()
    assert (version, weights.header) == (0, header)
    assert (await trainer.write_weights()).version == 1


async def test_other_weights_than_those_that_were_announced_are_not_sent(make_trainer, make_group):
    """As after the death of a trainer between the two calls."""
    group = BroadcastGroup(0, "127.0.0.1", 1, 1, "gloo", 1000, 1.0)
    header = await (await make_trainer()).write_weights()
    other = await make_trainer()
    with pytest.raises(TransferError, match="has not written these weights"):
        await other.send_weights(header, group)
    await other.train_step(Batch([make_group()]))
    await other.write_weights()
    with pytest.raises(TransferError, match="has not written these weights"):
        await other.send_weights(header, group)


@pytest.mark.parametrize(("temperature", "effective"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
async def test_the_temperature_is_that_of_the_rollouts(make_trainer, config, make_group, temperature, effective):
    group = make_group()
    trainer = await make_trainer(rollout=replace(config.rollout, temperature=temperature))
    metrics = await trainer.train_step(Batch([group]))
    with torch.no_grad():
        logprobs_N, _ = TokenLogprobs(load_model(config.model, torch.float32, "cpu"), effective)(samples_of(group))
    behavior_N = torch.tensor(np.concatenate([completion.logprobs for completion in group.completions]))
    expected = (behavior_N - logprobs_N).mean()
    assert metrics["mismatch/kl_k1"] == pytest.approx(float(expected), rel=1e-4)


async def test_the_published_dtype_is_the_models(make_trainer, config):
    trainer = await make_trainer(model=replace(config.model, dtype="bfloat16"))
    weights, _ = await trainer.push_weights()
    assert {tensor.dtype for _, tensor in weights.tensors()} == {torch.bfloat16}


async def test_weights_that_are_not_finite_are_never_published(make_trainer, tmp_path):
    model = tiny_llama(width=32, layers=2, heads=2)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    trainer = await make_trainer(model=ModelConfig(path=str(tmp_path)))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        await trainer.push_weights()


async def test_the_age_bound_follows_from_the_buffer(make_trainer, make_group):
    trainer = await make_trainer()
    for _ in range(2):
        await trainer.train_step(Batch([make_group(advantages=(0.0, 0.0), version=0)]))
    with pytest.raises(StalenessError):
        await trainer.train_step(Batch([make_group(version=0)]))


async def test_a_new_trainer_goes_on_from_a_snapshot(make_trainer, make_group):
    trainer, other = await make_trainer(), await make_trainer()
    await trainer.train_step(Batch([make_group()]))
    state, version = await trainer.snapshot()
    assert version == state.version == 1
    await other.restore([state])
    again = Batch([make_group(version=1)])
    assert await other.train_step(again) == await trainer.train_step(again)
    (weights, version), (expected, _) = await other.push_weights(), await trainer.push_weights()
    assert version == 2
    assert (weights.buffer == expected.buffer).all()


async def test_a_snapshot_is_a_payload():
    assert Trainer.snapshot.returns_payload
