from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.actors.checkpointer import Checkpointer
from grpo.actors.trainer import Trainer
from grpo.checkpoint import store
from grpo.checkpoint.trainer_state import Parameters
from grpo.config.actors import LoraConfig
from grpo.config.algorithm import LossConfig
from grpo.config.operation import CheckpointConfig
from grpo.errors import CheckpointError
from grpo.types import Batch


@pytest.fixture
def config(config):
    return replace(config, checkpoint=CheckpointConfig(keep=2), model=replace(config.model, dtype="bfloat16"))


@pytest.fixture
async def trainer(config):
    trainer = Trainer(config)
    await trainer.setup()
    yield trainer
    await trainer.close()


@pytest.fixture
async def checkpointer(config, tmp_path):
    checkpointer = Checkpointer(config, str(tmp_path / "checkpoints"))
    yield checkpointer
    await checkpointer.close()


def names(tmp_path):
    return [path.name for path in store.checkpoints(tmp_path / "checkpoints")]


async def test_a_trainer_goes_on_from_what_was_saved(config, trainer, checkpointer, make_group, tmp_path):
    await trainer.train_step(Batch([make_group()]))
    state, _ = await trainer.snapshot()
    report = await checkpointer.save(1, [state], [(4, make_group(version=1))], {"step": 1})
    [path] = store.checkpoints(tmp_path / "checkpoints")
    assert report["seconds"] > 0
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    assert store.load_progress(path) == {"step": 1}

    other = Trainer(config)
    await other.setup()
    loaded, nothing = await checkpointer.load_trainer(str(path))
    assert nothing is None
    await other.restore(loaded)
    groups, serials = await checkpointer.load_groups(str(path))
    assert serials == [4]
    batch = Batch([group for _, group in groups])
    assert await other.train_step(batch) == await trainer.train_step(batch)
    (weights, version), (expected, _) = await other.push_weights(), await trainer.push_weights()
    assert version == 2
    assert (weights.buffer == expected.buffer).all()
    await other.close()


async def test_the_model_is_in_the_dtype_of_the_config(trainer, checkpointer, tmp_path):
    await checkpointer.save(1, [(await trainer.snapshot())[0]], [], {})
    [path] = store.checkpoints(tmp_path / "checkpoints")
    assert AutoModelForCausalLM.from_pretrained(path / "model").dtype == torch.bfloat16
    loaded, _ = await checkpointer.load_trainer(str(path))
    assert {tensor.dtype for tensor in Parameters(loaded).values()} == {torch.float32}


async def test_only_the_newest_are_kept(trainer, checkpointer, tmp_path):
    state, _ = await trainer.snapshot()
    for step in (1, 2, 3):
        await checkpointer.save(step, [state], [], {})
    assert names(tmp_path) == ["step_000003", "step_000002"]


async def test_an_old_one_that_can_not_be_removed_does_not_make_the_new_one_fail(
    trainer, checkpointer, tmp_path, monkeypatch, caplog
):
    def fail(folder, keep):
        raise OSError("Stale file handle")

    monkeypatch.setattr(store, "prune", fail)
    report = await checkpointer.save(1, [(await trainer.snapshot())[0]], [], {})
    assert report["bytes"] > 0
    assert names(tmp_path) == ["step_000001"]
    assert "can't be removed: Stale file handle" in caplog.text


async def test_one_checkpoint_is_written_at_a_time_and_closing_waits(trainer, config, tmp_path, monkeypatch):
    checkpointer, state = Checkpointer(config, str(tmp_path / "checkpoints")), (await trainer.snapshot())[0]
    started, go_on, written, real = threading.Event(), threading.Event(), [], store.save_checkpoint

    def slow(folder, step, *args):
        started.set()
        go_on.wait()
        written.append(step)
        return real(folder, step, *args)

    monkeypatch.setattr(store, "save_checkpoint", slow)
    saves = [asyncio.create_task(checkpointer.save(step, [state], [], {})) for step in (1, 2)]
    await asyncio.to_thread(started.wait)
    closing = asyncio.create_task(checkpointer.close())
    await asyncio.sleep(0.01)
    assert not closing.done()  # and the loop goes on meanwhile
    go_on.set()
    await asyncio.gather(*saves, closing)
    assert written == [1, 2]
    assert names(tmp_path) == ["step_000002", "step_000001"]


async def test_what_can_not_be_written_or_read_is_a_typed_error(trainer, checkpointer, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="step 1 can't be written"):
        await checkpointer.save(1, [(await trainer.snapshot())[0]], [], {})
    with pytest.raises(CheckpointError, match="can't be read"):
        await checkpointer.load_trainer(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="can't be read"):
        await checkpointer.load_groups(str(tmp_path / "nowhere"))


async def test_states_and_groups_are_payloads():
    assert Checkpointer.load_trainer.returns_payload
    assert Checkpointer.load_groups.returns_payload


async def test_of_adapters_only_they_are_kept_and_gone_on_from(config, make_group, tmp_path):
    config = replace(config, lora=LoraConfig(rank=4), loss=LossConfig(beta=0.1))
    trainer, other, checkpointer = Trainer(config), Trainer(config), Checkpointer(config, str(tmp_path / "checkpoints"))
    for actor in (trainer, other):
        await actor.setup()
    await trainer.train_step(Batch([make_group()]))
    await checkpointer.save(1, [(await trainer.snapshot())[0]], [], {})
    [path] = store.checkpoints(tmp_path / "checkpoints")
    store.verify(path)
    assert {file.name for file in (path / "model").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (path / "model/config.json").exists()
    states, _ = await checkpointer.load_trainer(str(path))
    assert all(".lora_" in name for name in Parameters(states))
    await other.restore(states)
    again = Batch([make_group(version=1)])
    assert await other.train_step(again) == await trainer.train_step(again)
    for actor in (trainer, other, checkpointer):
        await actor.close()
