"""Dynamic sampling: with `filter.zero_variance`, zero-variance groups are replaced by new ones."""

import asyncio
import json
import weakref

import pytest

from grpo.actors.generator import Generator
from grpo.driver.loop import train_loop
from grpo.errors import DataError
from grpo.services.local import launch_local
from tests.fakes import CountingTrainer, RewardBy


def one_in_four(serial, count):
    """Something can be learned from every fourth prompt; all answers to the others are right."""
    return [i % 2 for i in range(count)] if serial % 4 == 0 else [1] * count


@pytest.fixture
def config(tiny_config):
    tiny_config.generator.engine = "simulated"
    tiny_config.generator.args = {"latency_s": 0.001, "latency_sigma": 1.5, "mean_tokens": 4}
    tiny_config.rollout.concurrency = 64
    tiny_config.trainer.groups_per_step = 4
    tiny_config.trainer.max_steps = 10
    tiny_config.filter.zero_variance = True
    return tiny_config


@pytest.fixture
def one_by_one(config):
    """One rollout at a time, and none while the training is at work."""
    config.rollout.concurrency, config.buffer.max_policy_age = 1, 0
    return config


async def run_loop(config, recorder, rewards=one_in_four, **fakes):
    """Run to the end; returns the trainer, which remembers its batches."""
    fakes = {"trainer": CountingTrainer(), "reward": RewardBy(rewards), **fakes}
    async with launch_local(config, recorder.failures, fakes) as services:
        await train_loop(services, config, recorder, asyncio.Event())
    return fakes["trainer"]


def lines(recorder, name):
    recorder.run_dir.close()
    return [json.loads(line) for line in (recorder.run_dir.path / name).read_text().splitlines()]


def serials(trainer):
    return [group.prompt.serial for batch in trainer.batches for group in batch.groups]


@pytest.mark.parametrize(("max_policy_age", "window"), [(0, 1), (1, 1), (3, 1), (1, 5)])
async def test_only_groups_with_something_to_learn_from_reach_the_trainer(
    config, make_recorder, max_policy_age, window
):
    config.buffer.max_policy_age, config.buffer.reorder_window = max_policy_age, window
    recorder = make_recorder(config)
    trainer = await run_loop(config, recorder)
    assert [len(batch.groups) for batch in trainer.batches] == [4] * 10
    assert all(serial % 4 == 0 for serial in serials(trainer))
    assert len(set(serials(trainer))) == 40
    assert max(trainer.ages) <= config.age_bound


async def test_groups_are_trained_on_in_the_order_of_admission(config, make_recorder):
    trainer = await run_loop(config, make_recorder(config))
    assert serials(trainer) == list(range(0, 160, 4))


async def test_every_group_is_trained_on_dropped_or_under_way(config, make_recorder):
    recorder = make_recorder(config)
    trainer = await run_loop(config, recorder)
    pacer, summary = recorder.pacer, recorder.write_summary("completed")
    assert pacer.trained == 40
    assert set(pacer.dropped) == {"zero_variance"}
    assert pacer.dropped.total() > 100 > pacer.capacity  # the tickets come back
    assert pacer.outstanding <= pacer.capacity
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding
    assert summary["groups_dropped"] == dict(pacer.dropped)

    ledger = lines(recorder, "ledger.jsonl")
    dropped = [line for line in ledger if "dropped" in line]
    assert {line["reason"] for line in dropped} == {"zero_variance"}
    assert len({tuple(line["dropped"]) for line in dropped}) == len(dropped) == pacer.dropped.total()
    assert all(serial % 4 for _, serial in (line["dropped"] for line in dropped))
    assert [serial for line in ledger for _, serial in line.get("trained", [])] == serials(trainer)


async def test_without_the_filter_nothing_is_dropped(config, make_recorder):
    config.filter.zero_variance = False
    recorder = make_recorder(config)
    trainer = await run_loop(config, recorder)
    assert serials(trainer) == list(range(40))
    assert recorder.pacer.dropped == {}
    assert {line["rollout/zero_variance_dropped"] for line in lines(recorder, "metrics.jsonl")} == {0}


async def test_the_metrics_tell_all_groups_from_those_trained_on(one_by_one, make_recorder):
    one_by_one.trainer.max_steps, one_by_one.shaping.scale = 3, 2.0
    recorder = make_recorder(one_by_one)
    await run_loop(one_by_one, recorder)
    steps = lines(recorder, "metrics.jsonl")
    assert [step["rollout/zero_variance_dropped"] for step in steps] == [9, 12, 12]
    assert [step["reward/mean"] for step in steps] == [0.5, 0.5, 0.5]
    of_all = [(4 * 0.5 + 9) / 13, 0.875, 0.875]
    assert [step["rollout/reward_mean"] for step in steps] == pytest.approx(of_all)
    assert [step["rollout/shaped_reward_mean"] for step in steps] == pytest.approx([2 * mean for mean in of_all])


async def test_a_policy_that_is_always_right_ends_the_run(config, make_recorder):
    config.filter.max_dropped_batches = 2
    recorder, trainer = make_recorder(config), CountingTrainer()
    with pytest.raises(
        DataError,
        match=r"^filter\.zero_variance: dropped 9 zero-variance groups before a batch was full "
        r"\(9 with reward 1 throughout\); .* prompts: use easier or harder ones, a larger rollout\.group_size, "
        r"or raise filter\.max_dropped_batches$",
    ) as caught:
        await run_loop(config, recorder, lambda serial, count: [1] * count, trainer=trainer)
    assert type(caught.value) is DataError
    assert trainer.batches == []
    assert not hasattr(caught.value, "__notes__")  # said once, however many rollouts drop one more
    assert recorder.pacer.dropped["zero_variance"] >= 8
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_answers_that_are_all_cut_off_and_masked_end_the_run(config, make_recorder):
    config.filter.max_dropped_batches, config.shaping.overlong = 1, "mask"
    config.generator.args = {"mean_tokens": None}
    with pytest.raises(DataError, match=r": dropped 5 zero-variance groups .* \(all completions masked\); "):
        await run_loop(config, make_recorder(config), lambda serial, count: range(count))


async def test_a_batch_in_between_fills_the_patience_up(one_by_one, make_recorder):
    """Every other group is dropped: four between two steps, as many as are tolerated."""
    one_by_one.filter.max_dropped_batches = 1
    recorder = make_recorder(one_by_one)
    await run_loop(one_by_one, recorder, lambda serial, count: [0] * count if serial % 2 else range(count))
    assert recorder.pacer.dropped == {"zero_variance": 39}


async def test_the_payload_of_a_dropped_group_is_not_kept_alive(one_by_one, make_recorder):
    seen, alive = [], []

    class Watched:
        """A generator that remembers what became of its answers."""

        def __init__(self, generator):
            self._generator = generator

        def __getattr__(self, name):
            return getattr(self._generator, name)

        async def generate(self, prompt, params):
            completions, report = await self._generator.generate(prompt, params)
            seen.extend((prompt.serial, weakref.ref(completion)) for completion in completions)
            return completions, report

    class Looking(CountingTrainer):
        async def train_step(self, batch):
            alive.append({serial for serial, completion in seen if completion() is not None})
            return await super().train_step(batch)

    one_by_one.trainer.max_steps = 3
    generator = Watched(Generator(one_by_one))
    await run_loop(one_by_one, make_recorder(one_by_one), generator=generator, trainer=Looking())
    assert {serial for serial, _ in seen} >= set(range(45))
    assert all(serial % 4 == 0 for serials in alive for serial in serials)
