"""The real loop in one process, whose actors are killed at chosen moments: what is learned stays the same."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from grpo.driver.loop import train_loop
from grpo.errors import ActorDied, PayloadLost, RecoveryError
from grpo.services.local import launch_local
from tests.fakes import CountingTrainer


class Executioner:
    """Kills an actor's process around the call of one of its methods: before it, in it, or when it has answered."""

    def __init__(self, services, actor, method, nth, when):
        self.done = asyncio.Event()
        self._service, self._method, self._nth, self._when = getattr(services, actor).service, method, nth, when
        self._calls = 0
        spawn = self._service.context.spawn
        self._service.context.spawn = lambda name: self._armed(spawn(name))
        for replica in self._service.replicas:
            self._armed(replica.endpoint)

    def _armed(self, endpoint):
        invoke = endpoint.invoke

        async def deadly(method, args=(), kwargs=None):
            counts = method == self._method and not self.done.is_set()
            self._calls += counts
            if not counts or self._calls != self._nth:
                return await invoke(method, args, kwargs)
            self.done.set()
            if self._when == "before":
                endpoint.kill()
            if self._when == "in":
                asyncio.get_running_loop().call_soon(endpoint.kill)
            result = await invoke(method, args, kwargs)
            if self._when == "lost answer":
                endpoint.kill()
                raise ActorDied("it died before the answer arrived")
            if self._when == "after":
                endpoint.kill()
            return result

        endpoint.invoke = deadly
        return endpoint


@asynccontextmanager
async def launched(config, make_recorder, fakes=None):
    recorder = make_recorder(config)
    async with launch_local(config, recorder.failures, fakes) as services:
        yield services, recorder
        recorder.run_dir.close()


async def train(config, make_recorder, *deaths, fakes=None, lost_snapshots=0):
    """Run to the end with these deaths, (actor, method, nth call, when); returns (recorder, losses, final weights)."""
    async with launched(config, make_recorder, fakes) as (services, recorder):
        lost = lose(lost_snapshots, services)
        executioners = [Executioner(services, *death) for death in deaths]
        await train_loop(services, config, recorder, asyncio.Event())
        weights, _ = await services.trainer.push_weights.call_one()
    assert all(executioner.done.is_set() for executioner in executioners)
    assert len(lost) == lost_snapshots
    assert sum(recorder.failures.restarts.values()) == len(deaths)
    losses = [line["loss"] for line in recorder.run_dir.read("metrics.jsonl")]
    return recorder, losses, weights


@pytest.fixture(autouse=True)
async def without_debugging():
    """Debug mode notes the stack of every future: a third of the time of dozens of whole runs."""
    asyncio.get_running_loop().set_debug(False)


@pytest.fixture
def config(tiny_config):
    """One rollout at a time in step with the training: what is sampled and learned is exactly reproducible."""
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = 1
    tiny_config.loss.beta = 0.05
    tiny_config.correction.mode, tiny_config.correction.max_ratio = "mask", 5.0
    tiny_config.trainer.updates_per_batch = 2
    tiny_config.reward.workers = 1
    return tiny_config


_undisturbed = []


@pytest.fixture
async def undisturbed(config, make_recorder):
    """Losses and final weights of a run in which nobody dies; made once."""
    if not _undisturbed:
        _, losses, weights = await train(config, make_recorder)
        assert any(losses)
        _undisturbed.append((losses, weights))
    return _undisturbed[0]


DEATHS = [
    *[("trainer", "train_step", 2, when) for when in ("before", "in", "lost answer", "after")],
    ("trainer", "push_weights", 3, "in"),
    *[("trainer", "snapshot", nth, "lost answer") for nth in (1, 2)],
    ("trainer", "train_step", 1, "lost answer"),
    *[("generator", "generate", 3, when) for when in ("before", "lost answer")],
    *[("generator", "update_weights", 2, when) for when in ("before", "in", "lost answer", "after")],
    ("reward", "score", 2, "before"),
    ("reference", "logprobs", 3, "lost answer"),
    ("dataloader", "sample", 2, "lost answer"),
    *[("replay_buffer", "add", 3, when) for when in ("before", "in", "lost answer", "after")],
    ("replay_buffer", "add", 4, "after"),
    *[("replay_buffer", "sample", 2, when) for when in ("before", "in", "lost answer", "after")],
]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: " ".join(map(str, death)))
@pytest.mark.long
async def test_a_death_changes_nothing_in_what_is_learned(config, make_recorder, undisturbed, death):
    recorder, losses, weights = await train(config, make_recorder, death)
    assert (losses, weights.checksum) == (undisturbed[0], undisturbed[1].checksum)
    np.testing.assert_array_equal(weights.buffer, undisturbed[1].buffer)
    assert recorder.pacer.admitted == recorder.pacer.trained + recorder.pacer.outstanding


TRANSFER_DEATHS = [
    *[
        ("generator", "receive_weights", nth, when)
        for nth in (2, 3)
        for when in ("before", "in", "lost answer", "after")
    ],
    *[("trainer", "send_weights", 2, when) for when in ("before", "in", "lost answer", "after")],
    *[("trainer", "write_weights", 2, when) for when in ("before", "lost answer", "after")],
    ("trainer", "train_step", 2, "lost answer"),
]


@pytest.mark.parametrize("death", TRANSFER_DEATHS, ids=lambda death: " ".join(map(str, death)))
@pytest.mark.long
async def test_a_death_around_a_broadcast_of_weights_changes_nothing(config, make_recorder, undisturbed, death):
    """The first three broadcasts make calls 1 and 2, 3 and 4, ... of two generators."""
    config.weight_sync.transport, config.weight_sync.timeout_s, config.generator.replicas = "collective", 5.0, 2
    recorder, losses, weights = await train(config, make_recorder, death)
    assert (losses, weights.checksum) == (undisturbed[0], undisturbed[1].checksum)
    assert recorder.pacer.admitted == recorder.pacer.trained + recorder.pacer.outstanding


@pytest.mark.parametrize("when", ["before", "lost answer", "after"])
async def test_a_death_around_a_group_that_is_dropped_changes_nothing_either(config, make_recorder, when):
    config.filter.zero_variance = True
    config.reward.functions = {"tests.fake_rewards:sometimes_equal": 1.0}
    _, losses, weights = await train(config, make_recorder)
    recorder, again, weights_again = await train(config, make_recorder, ("replay_buffer", "skip", 2, when))
    assert (losses, weights.checksum) == (again, weights_again.checksum)
    pacer = recorder.pacer
    assert pacer.dropped["zero_variance"] >= 2
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding


async def test_several_deaths_in_one_run_change_nothing_either(config, make_recorder, undisturbed):
    deaths = [("trainer", "train_step", 3, "in"), ("replay_buffer", "add", 2, "after"), ("reward", "score", 5, "in")]
    _, losses, _ = await train(config, make_recorder, *deaths)
    assert losses == undisturbed[0]


@pytest.mark.parametrize("every", [2, 10], ids=["after a snapshot", "from the start"])
async def test_between_two_snapshots_the_trainer_takes_its_steps_again(config, make_recorder, undisturbed, every):
    config.trainer.snapshot_every = every
    recorder, losses, weights = await train(config, make_recorder, ("trainer", "train_step", 3, "in"))
    assert losses == undisturbed[0]
    np.testing.assert_array_equal(weights.buffer, undisturbed[1].buffer)
    assert recorder.failures.restarts == {"trainer": 1}


def lose(snapshots, services):
    """Trainers to come are told of so many snapshots that they were lost with a node."""
    service, lost = services.trainer.service, []
    spawn = service.context.spawn

    def spawn_without(name):
        endpoint = spawn(name)
        invoke = endpoint.invoke

        async def losing(method, args=(), kwargs=None):
            if method == "restore" and len(lost) < snapshots:
                lost.append(args)
                raise PayloadLost("with its node")
            return await invoke(method, args, kwargs)

        endpoint.invoke = losing
        return endpoint

    service.context.spawn = spawn_without
    return lost


@pytest.mark.parametrize("every", [1, 2], ids=["the one before", "the start"])
async def test_where_a_snapshot_was_lost_with_its_node_the_trainer_goes_on_from(
    config, make_recorder, undisturbed, every
):
    config.trainer.snapshot_every = every
    death = ("trainer", "train_step", 3, "lost answer")
    recorder, losses, weights = await train(config, make_recorder, death, lost_snapshots=1)
    assert losses == undisturbed[0]
    np.testing.assert_array_equal(weights.buffer, undisturbed[1].buffer)
    assert recorder.failures.restarts == {"trainer": 1}


async def test_a_trainer_whose_snapshots_are_all_lost_ends_the_run_and_says_how_to_go_on(config, make_recorder):
    with pytest.raises(RecoveryError, match=r"state was lost with its node .* resume=auto"):
        await train(config, make_recorder, ("trainer", "train_step", 3, "in"), lost_snapshots=2)


async def test_without_snapshots_a_trainer_that_dies_ends_the_run_and_says_how_to_go_on(config, make_recorder):
    config.trainer.snapshot_every = 0
    with pytest.raises(RecoveryError, match=r"trainer.snapshot_every=0 keeps no copy .* resume=auto"):
        await train(config, make_recorder, ("trainer", "train_step", 2, "in"))


async def test_a_trainer_that_dies_time_and_again_ends_the_run_with_its_error(config, make_recorder):
    config.recovery.max_restarts = 2
    config.generator.engine, config.loss.beta = "simulated", 0.0

    class Dying(CountingTrainer):
        async def train_step(self, batch):
            raise ActorDied("trainer died: out of memory")

    with pytest.raises(ActorDied, match=r"out of memory; no restarts left .recovery.max_restarts=2 between two train "):
        await train(config, make_recorder, fakes={"trainer": Dying()})
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("max_policy_age", [0, 1, 4])
async def test_groups_that_a_dead_buffer_held_are_made_again(config, make_recorder, max_policy_age):
    """A thousand groups of a simulated engine; the buffer dies again and again, with what it holds."""
    config.generator.engine, config.generator.args = "simulated", {"latency_s": 0.002, "latency_sigma": 1.0}
    config.loss.beta, config.rollout.concurrency, config.buffer.max_policy_age = 0.0, 64, max_policy_age
    config.trainer.groups_per_step, config.trainer.max_steps = 4, 40
    trainer = CountingTrainer()
    async with launched(config, make_recorder, {"trainer": trainer}) as (services, recorder):

        async def kill():
            for step in range(3, 36, 3):
                await trainer.until(step)
                services.replay_buffer.service.replicas[0].endpoint.kill()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(train_loop(services, config, recorder, asyncio.Event()))
            tasks.create_task(kill())
    assert recorder.failures.restarts == {"replay_buffer": 11}
    assert max(trainer.ages) <= max_policy_age
    pacer = recorder.pacer
    assert (pacer.trained, pacer.admitted) == (160, pacer.trained + pacer.outstanding)
    if max_policy_age == 4:  # with less of it, hardly anything lies there between two steps
        assert pacer.requeued["replay_buffer"] > 0
    serials = [group.prompt.serial for batch in trainer.batches for group in batch.groups]
    assert len(set(serials)) == len(serials) == 160
