"""The real loop with the actors in this process: tiny torch models, simulated engines, or fakes."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.actors.generator import Generator
from grpo.actors.specs import actor_specs
from grpo.actors.trainer import Trainer
from grpo.algorithms.advantages import ADVANTAGES
from grpo.driver.loop import train_loop
from grpo.driver.rollout import sampling_params
from grpo.engines.torch.batch import DecodeBatch
from grpo.errors import (
    DataError,
    RewardCrash,
    RewardError,
    RewardInvalid,
    RewardMemory,
    RewardTimeout,
    StalledError,
    WeightsError,
)
from grpo.services.local import LocalEndpoint, launch_local
from grpo.types import Batch, Group
from tests.fakes import CountingTrainer, GatedGenerator


async def run_loop(config, make_recorder, fakes=None, shutdown=None):
    """Run to the end; returns (pacer, recorder, path of the run folder, final weights)."""
    recorder = make_recorder(config)
    async with launch_local(config, recorder.failures, fakes) as services:
        await train_loop(services, config, recorder, shutdown or asyncio.Event())
        weights, _ = await services.trainer.push_weights.call_one()
    recorder.run_dir.close()
    return recorder.pacer, recorder, recorder.run_dir.path, weights


def lines(path, name):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


async def sequential(config):
    """GRPO as a textbook writes it: no tasks, no tickets, no buffer. Returns (losses, final weights)."""
    specs = {spec.name: spec for spec in actor_specs(config)}
    actors = {name: spec.cls(**spec.kwargs) for name, spec in specs.items()}
    for actor in actors.values():
        if hasattr(actor, "setup"):
            await actor.setup()
    dataloader, generator, trainer = actors["dataloader"], actors["generator"], actors["trainer"]

    async def completions_of(prompt, params):
        """Returns the prompt, its completions, their rewards and their oldest version."""
        if "environment" in actors:
            completions, played = await actors["environment"].play(prompt, params, LocalEndpoint(generator))
            prompt = replace(prompt, token_ids=played.opening)
            return prompt, completions, played.scores.rewards, played.generation.oldest_version
        completions, report = await generator.generate(prompt, params)
        return prompt, completions, (await actors["reward"].score(prompt, completions)).rewards, report.oldest_version

    losses, next_serial = [], 0
    weights, _ = await trainer.push_weights()
    for _ in range(config.trainer.max_steps):
        await generator.update_weights(weights)
        groups = []
        batch = await dataloader.sample(next_serial, config.trainer.groups_per_step)
        next_serial = batch.next_serial
        for prompt in batch.prompts:
            params = sampling_params(config.rollout, config.seed, prompt)
            prompt, completions, rewards, oldest = await completions_of(prompt, params)
            advantages = tuple(ADVANTAGES[config.loss.advantages](torch.tensor(rewards, dtype=torch.float64)).tolist())
            groups.append(Group(prompt, completions, None, rewards, advantages, oldest))
        losses.append((await trainer.train_step(Batch(groups)))["loss"])
        weights, _ = await trainer.push_weights()
    for actor in actors.values():
        if hasattr(actor, "close"):
            await actor.close()
    return losses, weights


async def test_adapters_are_trained_against_their_own_base(tiny_config, make_recorder):
    """Without a reference actor, of which the KL term is 0 at the first step and then is not."""
    tiny_config.lora.rank, tiny_config.loss.beta = 4, 0.1
    tiny_config.buffer.max_policy_age = 0
    _, recorder, path, weights = await run_loop(tiny_config, make_recorder)
    steps = lines(path, "metrics.jsonl")
    assert steps[0]["trainer/reference_kl"] == 0 < steps[-1]["trainer/reference_kl"]
    assert all(step["mismatch/logprob_abs_diff_same_version"] < 1e-4 for step in steps)
    assert all(".lora_" in spec.name for spec in weights.specs)
    assert "reference" not in {name for replicas in recorder.replicas.values() for name in replicas}


@pytest.fixture
def joined(monkeypatch):
    """How many completions have begun to be sampled together, each time that some did."""
    counts, step = [], DecodeBatch.step

    def counted(batch, joining):
        counts.extend([sum(request.to_join for request in joining)] if joining else [])
        return step(batch, joining)

    monkeypatch.setattr(DecodeBatch, "step", counted)
    return counts


@pytest.mark.parametrize("task", ["sorting", "words"])
async def test_synchronous_with_one_rollout_equals_a_sequential_loop_bit_for_bit(
    tiny_config, make_recorder, joined, task
):
    """Episodes too, if all turns are of one length and all replies there at once: groups stay together."""
    if task == "words":
        tiny_config.task.target, tiny_config.task.args = "tests.fake_environments:WordsAtOnce", {}
        tiny_config.environment.max_turn_tokens, tiny_config.rollout.max_completion_tokens = 1, 24
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = 1
    losses, weights = await sequential(tiny_config)
    _, _, path, loop_weights = await run_loop(tiny_config, make_recorder)
    assert [step["loss"] for step in lines(path, "metrics.jsonl")] == losses
    assert any(losses)
    np.testing.assert_array_equal(loop_weights.buffer, weights.buffer)
    assert set(joined) == {tiny_config.rollout.group_size}


async def test_episodes_equal_a_sequential_loop_up_to_rounding(tiny_config, make_recorder):
    """Which turns of a group are decoded together depends on when threads reply, and so does the rounding."""
    tiny_config.task.target, tiny_config.task.args = "tests.fake_environments:Words", {}
    tiny_config.rollout.max_completion_tokens = 24
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = tiny_config.trainer.max_steps = 1
    losses, _ = await sequential(tiny_config)
    _, _, path, _ = await run_loop(tiny_config, make_recorder)
    assert [step["loss"] for step in lines(path, "metrics.jsonl")] == pytest.approx(losses, rel=1e-4)
    assert any(losses)


async def test_synchronous_with_many_rollouts_samples_the_same_tokens(tiny_config, make_recorder):
    tiny_config.buffer.max_policy_age = 0
    tiny_config.trainer.groups_per_step = 8
    tiny_config.trainer.max_steps = 1
    samples = []
    for concurrency in (1, 32):
        tiny_config.rollout.concurrency = concurrency
        _, _, path, _ = await run_loop(tiny_config, make_recorder)
        groups = [g for g in lines(path, "rollouts.jsonl") if g["prompt_serial"] < 8]
        samples.append({g["prompt_serial"]: g["completions"] for g in groups})
    assert len(samples[0]) == 8
    assert samples[0] == samples[1]


@pytest.fixture
def simulated(tiny_config):
    tiny_config.generator.engine = "simulated"
    tiny_config.generator.args = {"latency_s": 0.002, "latency_sigma": 1.5, "mean_tokens": 4}
    tiny_config.rollout.concurrency = 64
    tiny_config.trainer.groups_per_step = 4
    tiny_config.trainer.max_steps = 25
    return tiny_config


@pytest.mark.parametrize("max_policy_age", [0, 1, 3])
async def test_age_stays_within_the_bound_and_reaches_it(simulated, make_recorder, max_policy_age):
    simulated.buffer.max_policy_age = max_policy_age
    trainer = CountingTrainer()
    pacer, *_ = await run_loop(simulated, make_recorder, {"trainer": trainer})
    assert max(trainer.ages) == max_policy_age
    assert pacer.trained == 100
    assert pacer.admitted == pacer.trained + pacer.outstanding
    assert pacer.outstanding <= pacer.capacity


async def test_a_window_keeps_the_age_within_the_larger_bound(simulated, make_recorder):
    simulated.buffer.reorder_window = 5
    trainer = CountingTrainer()
    await run_loop(simulated, make_recorder, {"trainer": trainer})
    assert max(trainer.ages) <= simulated.age_bound == 2


async def test_every_prompt_is_trained_on_once(simulated, make_recorder):
    trainer = CountingTrainer()
    await run_loop(simulated, make_recorder, {"trainer": trainer})
    serials = sorted(group.prompt.serial for batch in trainer.batches for group in batch.groups)
    assert serials == sorted(set(serials))
    assert len(serials) == 100


async def test_groups_are_trained_on_in_the_order_of_admission(simulated, make_recorder):
    trainer = CountingTrainer()
    await run_loop(simulated, make_recorder, {"trainer": trainer})
    # Tickets and prompts are handed out in the same order here, so serials tell the order of admission.
    firsts = [min(group.prompt.serial for group in batch.groups) for batch in trainer.batches]
    assert firsts == sorted(firsts)


async def test_tickets_return_only_after_every_generator_has_the_new_weights(simulated, make_recorder):
    gate = asyncio.Event()
    generators = [Generator(simulated), Generator(simulated)]
    for generator in generators:
        await generator.setup()
    slow = GatedGenerator(generators[1], gate)
    simulated.generator.replicas = 2
    recorder = make_recorder(simulated)
    pacer = recorder.pacer
    async with launch_local(simulated, recorder.failures, {"trainer": CountingTrainer()}) as services:
        for replica, actor in zip(services.generator.service.replicas, (generators[0], slow), strict=True):
            replica.endpoint = LocalEndpoint(actor)
        task = asyncio.ensure_future(train_loop(services, simulated, recorder, asyncio.Event()))
        await slow.asked.wait()
        await asyncio.sleep(0.01)
        assert (pacer.trained, pacer.admitted) == (0, pacer.capacity)
        gate.set()
        await task
    assert pacer.trained == 100


@pytest.mark.parametrize("max_policy_age", [0, 1, 2])
async def test_the_trainer_goes_on_while_weights_are_on_their_way_as_far_as_staleness_allows(
    simulated, make_recorder, max_policy_age
):
    """One step beyond the version that generators wait for, whose buffer the next one is written to."""
    simulated.buffer.max_policy_age = max_policy_age
    gate, trainer = asyncio.Event(), CountingTrainer()
    generator = Generator(simulated)
    await generator.setup()
    slow = GatedGenerator(generator, gate)
    recorder = make_recorder(simulated)
    async with launch_local(simulated, recorder.failures, {"trainer": trainer, "generator": slow}) as services:
        task = asyncio.ensure_future(train_loop(services, simulated, recorder, asyncio.Event()))
        await slow.asked.wait()
        reached = 1 if max_policy_age == 0 else 2
        await trainer.until(reached)
        await asyncio.sleep(0.05)
        assert (trainer.version, recorder.pacer.trained, recorder.step) == (reached, 0, 0)
        gate.set()
        await task
    assert (trainer.version, recorder.pacer.trained, max(trainer.ages)) == (25, 100, max_policy_age)


async def test_an_error_in_a_rollout_ends_the_run_with_that_error(simulated, make_recorder):
    simulated.generator.args["failure_rate"] = 0.05
    with pytest.raises(RuntimeError, match="simulated engine failure"):
        await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_error_in_the_trainer_ends_the_run_with_that_error(simulated, make_recorder):
    class Failing(CountingTrainer):
        async def train_step(self, batch):
            raise ZeroDivisionError("no step")

    with pytest.raises(ZeroDivisionError, match="no step"):
        await run_loop(simulated, make_recorder, {"trainer": Failing()})
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failed_weight_update_ends_the_run_instead_of_serving_stale_weights(tiny_config, make_recorder):
    with pytest.raises(WeightsError, match="does not fit the model"):
        await run_loop(tiny_config, make_recorder, {"trainer": CountingTrainer()})


async def test_reward_errors_end_the_run_or_drop_the_group(simulated, make_recorder):
    simulated.reward.functions = {"tests.fake_rewards:sometimes_raising": 1.0}
    with pytest.raises(Exception, match=r"sometimes_raising' on prompt .* raised ValueError: an odd question"):
        await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})

    simulated.reward.on_error = "drop"
    pacer, *_ = await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})
    assert pacer.trained == 100
    assert pacer.dropped["reward_error"] > 0
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding


async def test_reward_timeouts_are_counted_apart_from_other_reward_errors(simulated, make_recorder):
    simulated.reward.functions = {"tests.fake_rewards:sometimes_timing_out": 1.0}
    simulated.reward.on_error = "drop"
    pacer, *_ = await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})
    assert set(pacer.dropped) == {"reward_timeout", "reward_error"}
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding


@pytest.mark.parametrize(
    ("reward", "error"),
    [
        ("sleeping", RewardTimeout),
        ("dying", RewardCrash),
        ("raising", RewardError),
        ("not_a_number", RewardInvalid),
        ("greedy", RewardMemory),
    ],
)
async def test_whatever_a_reward_does_the_run_ends_with_the_kind_of_it_or_counts_it(
    simulated, make_recorder, reward, error
):
    simulated.reward.functions = {f"tests.fake_rewards:{reward}": 1.0}
    simulated.rollout.concurrency = 2
    simulated.reward.timeout_s = 0.3 if reward == "sleeping" else 300.0  # a busy machine may take its time
    with pytest.raises(error, match=reward) as caught:
        await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})
    assert type(caught.value) is error

    simulated.reward.on_error, simulated.recovery.max_dropped_groups = "drop", 3
    recorder = make_recorder(simulated)
    async with launch_local(simulated, recorder.failures, {"trainer": CountingTrainer()}) as services:
        with pytest.raises(DataError, match=r"recovery.max_dropped_groups=3 between two train steps"):
            await train_loop(services, simulated, recorder, asyncio.Event())
    assert set(recorder.pacer.dropped) == {error.reason}  # three are tolerated, one more, or two at once, end the run
    assert recorder.pacer.dropped.total() in (4, 5)


async def test_rewards_that_fail_in_every_way_are_dropped_by_kind_and_the_run_goes_on(simulated, make_recorder):
    simulated.reward.functions = {"tests.fake_rewards:failing_in_every_way": 1.0}
    simulated.reward.on_error, simulated.reward.timeout_s, simulated.reward.workers = "drop", 0.2, 4
    simulated.trainer.max_steps, simulated.rollout.concurrency = 2, 16
    pacer, recorder, path, _ = await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})
    assert set(pacer.dropped) == {"reward_timeout", "reward_crash", "reward_invalid"}
    assert pacer.trained == 8
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding
    in_ledger = [line for line in lines(path, "ledger.jsonl") if "dropped" in line]
    assert len(in_ledger) == pacer.dropped.total()
    assert recorder.failures.restarts == {}


class PoisonedTrainer(Trainer):
    """NaN gets into its gradients in step 2, or into its weights after it."""

    def __init__(self, config, where):
        super().__init__(config, threads=1)
        self._where = where

    async def train_step(self, batch):
        parameter = next(self._learner.model.parameters())
        if self._where == "gradients" and self._learner.version == 1:
            poison = parameter.register_hook(lambda gradient: gradient * float("nan"))
            metrics = await super().train_step(batch)
            poison.remove()
            return metrics
        metrics = await super().train_step(batch)
        if self._where == "weights" and self._learner.version == 2:
            parameter.data[0, 0] = float("nan")
        return metrics


async def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(tiny_config, make_recorder):
    trainer = PoisonedTrainer(tiny_config, "gradients")
    _, _, path, weights = await run_loop(tiny_config, make_recorder, {"trainer": trainer})
    assert [line["trainer/nonfinite_steps"] for line in lines(path, "metrics.jsonl")] == [0, 1, 1]
    assert all(np.isfinite(tensor.numpy()).all() for _, tensor in weights.tensors())


async def test_weights_that_are_not_finite_are_never_published(tiny_config, make_recorder):
    recorder = make_recorder(tiny_config)
    fakes = {"trainer": PoisonedTrainer(tiny_config, "weights")}
    async with launch_local(tiny_config, recorder.failures, fakes) as services:
        with pytest.raises(WeightsError, match="holds NaN or infinity at version 2: not published"):
            await train_loop(services, tiny_config, recorder, asyncio.Event())
        (generator,) = services.generator.service.replicas
        assert generator.endpoint.actor._engine.version == 1


async def test_a_shutdown_finishes_the_step_and_returns(simulated, make_recorder):
    shutdown = asyncio.Event()

    class Stopping(CountingTrainer):
        async def train_step(self, batch):
            if self.version == 4:
                shutdown.set()
                await asyncio.sleep(0.01)
            return await super().train_step(batch)

    trainer = Stopping()
    pacer, *_ = await run_loop(simulated, make_recorder, {"trainer": trainer}, shutdown)
    assert trainer.version == 5
    assert pacer.trained == 20
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_shutdown_ends_the_wait_for_a_batch(simulated, make_recorder):
    simulated.generator.args = {"latency_s": 3600.0}
    shutdown = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, shutdown.set)
    pacer, *_ = await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()}, shutdown)
    assert pacer.trained == 0


async def test_a_stalled_run_fails(simulated, make_recorder):
    simulated.generator.args = {"latency_s": 3600.0}
    simulated.watchdog.seconds = 2.0  # the loop has started by then, on a busy machine too
    with pytest.raises(
        StalledError,
        match=r"training on replay_buffer.sample \(\d s\); (\d+ )?rollouts on generator.generate \((oldest )?\d s\)",
    ):
        await run_loop(simulated, make_recorder, {"trainer": CountingTrainer()})


async def test_a_kl_term_brings_in_the_reference(tiny_config, make_recorder):
    tiny_config.loss.beta = 0.1
    _, _, path, _ = await run_loop(tiny_config, make_recorder)
    steps = lines(path, "metrics.jsonl")
    assert steps[0]["trainer/reference_kl"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["trainer/reference_kl"] > 1e-4


async def test_two_generators_share_the_work(simulated, make_recorder):
    simulated.generator.replicas = 2
    recorder = make_recorder(simulated)
    async with launch_local(simulated, recorder.failures, {"trainer": CountingTrainer()}) as services:
        await train_loop(services, simulated, recorder, asyncio.Event())
        stats = [replica.endpoint.actor._engine.stats().tokens for replica in services.generator.service.replicas]
    assert min(stats) > 0.25 * sum(stats)
