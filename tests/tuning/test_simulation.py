"""The real loop on simulated actors, against what can be worked out by hand; and a clock that jumps."""

import asyncio
import dataclasses

import pytest

from grpo.config.schema import RunConfig
from grpo.tuning.profile import Cost, GroupShape, Profile
from grpo.tuning.search import search
from grpo.tuning.simulation import run_in_virtual_time, simulate

TOKENS, TRAIN_S, TOKEN_S, PREFILL_S = 11, 3.0, 0.1, 0.5
GROUP_S = PREFILL_S + (TOKENS - 1) * TOKEN_S
ALL_S = PREFILL_S + TOKEN_S + GROUP_S  # the first to come joins alone; the others together, a token later
STEPS = 30


@pytest.fixture
def profile():
    """Calls take no time, and a token as much for many completions as for one."""
    return Profile(
        groups=(GroupShape((TOKENS,) * 4),),
        decode=Cost(TOKEN_S),
        prefill=Cost(PREFILL_S),
        train=Cost(TRAIN_S),
        score=(0.0,),
        call=0.0,
        call_driver=0.0,
    )


@pytest.fixture
def config():
    config = RunConfig()
    config.rollout.group_size, config.trainer.groups_per_step = 4, 8
    config.rollout.concurrency, config.buffer.max_policy_age = 8, 0
    return config


def test_synchronous_training_takes_both_times(profile, config):
    outcome = simulate(profile, config, STEPS)
    assert outcome.steps_per_s == pytest.approx(1 / (ALL_S + TRAIN_S))
    assert outcome.trainer_wait == pytest.approx(ALL_S / (ALL_S + TRAIN_S))
    assert outcome.generator_busy == pytest.approx(ALL_S / (ALL_S + TRAIN_S))
    assert outcome.policy_age == 0


def test_one_rollout_makes_one_group_after_another(profile, config):
    config.rollout.concurrency = 1
    outcome = simulate(profile, config, STEPS)
    assert outcome.steps_per_s == pytest.approx(1 / (8 * GROUP_S + TRAIN_S))


def test_asynchronous_training_takes_the_longer_time(profile, config):
    config.rollout.concurrency, config.buffer.max_policy_age = 16, 1
    outcome = simulate(profile, config, STEPS)
    assert outcome.steps_per_s == pytest.approx(1 / TRAIN_S)
    assert outcome.trainer_wait == pytest.approx(0)
    assert outcome.policy_age == 1

    slow = dataclasses.replace(profile, train=Cost(0.1))
    outcome = simulate(slow, config, STEPS)
    assert outcome.trainer_wait > 0.7
    assert outcome.generator_busy == pytest.approx(1, abs=0.02)


def test_what_has_no_room_in_the_batch_waits(profile, config):
    config.generator.max_sequences = 16  # four groups of eight
    assert simulate(profile, config, STEPS).steps_per_s == pytest.approx(1 / (2 * ALL_S + TRAIN_S))
    config.generator.replicas = 2
    assert simulate(profile, config, STEPS).steps_per_s == pytest.approx(1 / (ALL_S + TRAIN_S))


def test_weights_are_published_and_loaded_between_two_steps(profile, config):
    profile = dataclasses.replace(profile, publish=0.3, load=0.2, snapshot=0.1)
    outcome = simulate(profile, config, STEPS)  # a snapshot is taken while the generators load
    assert outcome.steps_per_s == pytest.approx(1 / (ALL_S + TRAIN_S + 0.3 + 0.2))


def test_contention_slows_both(profile, config):
    config.rollout.concurrency, config.buffer.max_policy_age = 16, 1
    contended = dataclasses.replace(profile, decode_slowed=0.5, train_slowed=0.5)
    slowed_s = 1.5 * ALL_S  # while the generators work, in which the trainer does work for ALL_S; then it is alone
    assert simulate(contended, config, STEPS).steps_per_s == pytest.approx(1 / (slowed_s + TRAIN_S - ALL_S))


def test_rewards_wait_for_a_free_process(profile, config):
    config.reward.workers = 2
    outcome = simulate(dataclasses.replace(profile, score=(0.5,)), config, STEPS)
    assert outcome.steps_per_s == pytest.approx(1 / (ALL_S + 4 * 0.5 + TRAIN_S))


def test_groups_end_when_their_longest_completion_does(profile, config):
    ragged = dataclasses.replace(profile, groups=(GroupShape((1, 2, 3, 11)), GroupShape((5, 5, 5, 5))))
    assert simulate(ragged, config, STEPS).steps_per_s == pytest.approx(1 / (ALL_S + TRAIN_S))


def test_tokens_without_a_signal_cost_the_trainer_nothing(profile, config):
    profile = dataclasses.replace(
        profile, train=Cost(0.0, 0.01), groups=(GroupShape((TOKENS,) * 4), GroupShape((TOKENS,) * 4, signal=False))
    )
    assert simulate(profile, config, STEPS).steps_per_s == pytest.approx(1 / (ALL_S + 0.01 * 4 * 4 * TOKENS))


def test_the_controller_keeps_the_wait_about_where_the_search_does(profile, config):
    """Where fewer rollouts than the eight of a batch are enough."""
    config.buffer.max_policy_age, config.rollout.target_trainer_idle = 1, 0.1
    profile = dataclasses.replace(profile, prefill=Cost(0.01), decode=Cost(0.01), train=Cost(0.4))

    def measure(setting):
        chosen = dataclasses.replace(config.rollout, concurrency=setting.concurrency)
        return simulate(profile, dataclasses.replace(config, rollout=chosen), 40)

    found = search(measure, config.trainer.groups_per_step, (1,), 0.1)
    config.rollout.concurrency = "auto"
    steady = simulate(profile, config, 200)
    assert found.enough
    assert found.setting.concurrency < 8
    assert steady.trainer_wait <= 0.15


def test_hours_pass_at_once_and_in_order():
    async def sleeps():
        loop, woken = asyncio.get_running_loop(), []

        async def sleep(hours):
            await asyncio.sleep(hours * 3600)
            woken.append((hours, loop.time()))

        await asyncio.gather(*(sleep(hours) for hours in (3, 1, 2)))
        return woken

    assert run_in_virtual_time(sleeps()) == [(hours, pytest.approx(hours * 3600)) for hours in (1, 2, 3)]


def test_time_outs_are_in_virtual_time():
    async def waits():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e6):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(waits()) == pytest.approx(1e6)


def test_who_waits_for_a_thread_is_woken_by_it():
    assert run_in_virtual_time(asyncio.to_thread(lambda: "done")) == "done"


def test_a_deadlock_is_an_error(monkeypatch):
    monkeypatch.setattr("grpo.tuning.simulation._PATIENCE_S", 0.01)

    async def waits_for_ever():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="waits for another"):
        run_in_virtual_time(waits_for_ever())
