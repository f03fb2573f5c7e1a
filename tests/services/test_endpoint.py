"""Ranks in this process, whose collective is a barrier: who waits in it for a dead rank waits for ever."""

import asyncio

import pytest

from grpo.actors.marks import copied_to_driver, returns_payload
from grpo.config.operation import RecoveryConfig
from grpo.errors import ActorDied, StalenessError
from grpo.services.endpoint import Gang
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle
from grpo.services.local import LocalEndpoint
from grpo.services.replica import PreemptionState, ServiceContext, State, Timeouts
from grpo.services.service import Service
from grpo.telemetry.recording import measure


class Rank:
    """One of several that meet at every step."""

    def __init__(self, number, barrier):
        self.number, self._barrier = number, barrier
        self.met_at, self.heard, self.closed, self.waiting = None, [], False, asyncio.Event()
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def setup(self, rendezvous):
        self.met_at = rendezvous

    async def step(self, batch):
        await self.may_go.wait()
        self.heard.append(batch)
        measure("rank", self.number, "sum")
        self.waiting.set()
        await self._barrier.wait()
        return f"{batch} on {self.number}"

    async def alone(self):
        return f"{self.number} beside {self.heard}"

    async def late(self, turns, word):
        """Rank 1 takes longer than rank 0 until it begins."""
        for _ in range(turns * self.number):
            await asyncio.sleep(0)
        self.heard.append(word)

    async def meet(self, error):
        """Rank 0 notices that the others don't come."""
        self.waiting.set()
        if self.number == 0:
            raise error
        await self._barrier.wait()

    @copied_to_driver
    @returns_payload
    async def snapshot(self):
        return [self.number], self.number

    async def restore(self, states):
        self.heard.append(states)

    async def close(self):
        self.closed = True


class MeetsHere(LocalEndpoint):
    """Says where its generation of ranks meets."""

    def __init__(self, rank, name, generation):
        super().__init__(rank, name)
        self._generation = generation

    async def rendezvous(self):
        return "here", self._generation


class Fleet:
    """A service of one gang, with all ranks that were ever started, by generation."""

    def __init__(self, size=2, *, timeouts=None, setup=None):
        self.generations: list[list[Rank]] = []
        self.endpoints: list[tuple[LocalEndpoint, ...]] = []
        self.released = 0
        self.failures = Failures(RecoveryConfig())
        self._size, self._setup = size, setup
        common = ServiceContext(self._spawn, self.failures, timeouts or Timeouts(), PreemptionState())
        self.service = Service("trainer", common, 1)
        self.trainer = ActorHandle(self.service)

    def _spawn(self, name):
        barrier = asyncio.Barrier(self._size)
        ranks = [Rank(number, barrier) for number in range(self._size)]
        if self._setup is not None:
            for rank in ranks:
                rank.setup = lambda rendezvous, rank=rank: self._setup(self, rank)
        self.generations.append(ranks)
        generation = len(self.generations)
        self.endpoints.append(tuple(MeetsHere(rank, f"{name}-{rank.number}", generation) for rank in ranks))

        def release():
            self.released += 1

        return Gang(self.endpoints[-1], release, rank_zero_only={"alone"})

    async def __aenter__(self):
        await self.service.ready()
        return self

    async def __aexit__(self, *exception):
        await self.service.close(1.0)


async def is_dead(endpoint):
    try:
        await endpoint.ping()
    except ActorDied:
        return True
    return False


async def test_call_reaches_every_rank_and_has_their_answers_in_order():
    async with Fleet(3) as fleet:
        assert await fleet.trainer.step.call("batch") == [f"batch on {rank}" for rank in range(3)]


async def test_the_other_verbs_reach_every_rank_and_have_the_answer_of_the_first():
    async with Fleet() as fleet:
        assert await fleet.trainer.step.call_one("a") == "a on 0"
        assert await fleet.trainer.step.route("b") == "b on 0"
        assert await fleet.trainer.step.fanout("c") == ["c on 0"]
        assert [rank.heard for rank in fleet.generations[0]] == [["a", "b", "c"]] * 2


async def test_rank_0_is_asked_alone_while_all_are_at_work():
    async with Fleet() as fleet:
        first, second = fleet.generations[0]
        second.may_go.clear()
        step = asyncio.ensure_future(fleet.trainer.step.call("batch"))
        await first.waiting.wait()
        assert await fleet.trainer.alone.call() == ["0 beside ['batch']"]
        assert not step.done()
        second.may_go.set()
        assert await step == ["batch on 0", "batch on 1"]


async def test_the_ranks_are_told_where_they_meet_every_time_they_start():
    async with Fleet() as fleet:
        fleet.endpoints[0][1].kill()
        await fleet.trainer.step.call("batch")
        assert [[rank.met_at for rank in ranks] for ranks in fleet.generations] == [
            [("here", 1)] * 2,
            [("here", 2)] * 2,
        ]


async def test_every_rank_gets_calls_of_one_moment_in_the_same_order():
    async with Fleet() as fleet:
        await asyncio.gather(*(fleet.trainer.late.call(turns, turns) for turns in (9, 3, 0, 6)))
        assert [rank.heard for rank in fleet.generations[0]] == [[9, 3, 0, 6]] * 2


async def test_a_payload_of_every_rank_comes_back_to_all_of_them():
    async with Fleet() as fleet:
        answers = await fleet.trainer.snapshot.call()
        assert answers == [([0], 0), ([1], 1)]
        await fleet.trainer.restore.call([payload for payload, _ in answers])
        assert [rank.heard for rank in fleet.generations[0]] == [[[[0], [1]]]] * 2


@pytest.mark.parametrize("victim", [0, 1])
async def test_the_death_of_one_rank_ends_the_others_and_the_call_is_made_again_by_new_ones(victim):
    async with Fleet() as fleet:
        for rank in fleet.generations[0]:
            rank._barrier = asyncio.Barrier(3)  # so that nobody gets out of it
        step = asyncio.ensure_future(fleet.trainer.step.call("batch"))
        await asyncio.gather(*(rank.waiting.wait() for rank in fleet.generations[0]))
        fleet.endpoints[0][victim].kill()
        assert await step == ["batch on 0", "batch on 1"]
        assert all([await is_dead(endpoint) for endpoint in fleet.endpoints[0]])
        assert fleet.failures.restarts == {"trainer": 1}
        assert fleet.failures.deaths[0].error == f"trainer-{victim} died: it was killed"
        assert fleet.released == 1


async def test_a_rank_that_dies_while_nobody_calls_is_the_death_of_all():
    async with Fleet() as fleet:
        fleet.endpoints[0][1].kill()
        await asyncio.wait_for(fleet.service.context.changed.wait_for(lambda: len(fleet.generations) == 2), 5)
        assert await is_dead(fleet.endpoints[0][0])
        assert await fleet.trainer.step.call("batch") == ["batch on 0", "batch on 1"]


async def test_an_error_that_follows_from_a_death_is_that_death():
    """A transport notices that its peer is gone before anybody hears of the process."""
    async with Fleet() as fleet:
        first, second = fleet.endpoints[0]
        meet = first.invoke

        async def before_the_news(method, args, kwargs):
            try:
                return await meet(method, args, kwargs)
            finally:
                second.kill()

        first.invoke = before_the_news
        meeting = fleet.trainer.meet.call(RuntimeError("connection closed by peer"))
        with pytest.raises(RuntimeError):  # of the new ones, which are all alive
            await asyncio.wait_for(meeting, 60)
        assert fleet.failures.deaths[0].error == "trainer-1 died: it was killed"


async def test_an_error_of_one_rank_is_raised_though_the_others_wait_for_it():
    async with Fleet() as fleet:
        with pytest.raises(StalenessError, match="too old"):
            await fleet.trainer.meet.call(StalenessError("too old"))
        assert fleet.failures.restarts == {}


async def test_a_rank_that_does_not_answer_is_the_death_of_all():
    timeouts = Timeouts(start_s=60.0, health_interval_s=0.01, health_timeout_s=0.01)
    async with Fleet(timeouts=timeouts) as fleet:
        step = asyncio.ensure_future(fleet.trainer.step.call("batch"))
        await fleet.generations[0][0].waiting.wait()
        fleet.endpoints[0][1].ping = asyncio.Event().wait
        await step
        await asyncio.wait_for(fleet.service.context.changed.wait_for(lambda: len(fleet.generations) == 2), 5)
        assert "did not answer" in fleet.failures.deaths[0].error


async def test_replacements_of_which_one_dies_while_they_are_set_up_are_replaced_again():
    async def setup(fleet, rank):
        if len(fleet.generations) == 2:
            if rank.number == 1:
                fleet.endpoints[1][1].kill()
            await asyncio.Event().wait()

    async with Fleet(setup=setup) as fleet:
        fleet.endpoints[0][0].kill()
        assert await fleet.trainer.step.call("batch") == ["batch on 0", "batch on 1"]
        assert len(fleet.generations) == 3
        assert await is_dead(fleet.endpoints[1][0])


async def test_a_setup_that_fails_on_one_rank_ends_though_the_others_wait_for_it():
    async def setup(fleet, rank):
        if rank.number == 1:
            raise ValueError("no such model")
        await asyncio.Event().wait()

    fleet = Fleet(setup=setup)
    with pytest.raises(ValueError, match="no such model"):
        await fleet.service.ready()
    await fleet.service.close(0.1)
    assert all([await is_dead(endpoint) for endpoint in fleet.endpoints[0]])


async def test_a_newcomer_that_is_restored_is_all_ranks():
    async with Fleet() as fleet:
        fleet.trainer.on_restart(lambda replica: replica.restore.call_one("state"))
        fleet.endpoints[0][0].kill()
        await fleet.trainer.step.call("batch")
        assert [rank.heard for rank in fleet.generations[1]] == [["state", "batch"]] * 2


async def test_every_rank_is_a_source_of_what_was_recorded():
    async with Fleet() as fleet:
        await fleet.trainer.step.call("batch")
        harvests = {source.name: await source.drain(keep_recording=False) for source in fleet.trainer.processes()}
        assert {name: drain.metrics.drain() for name, drain in harvests.items()} == {
            "trainer-0": {"rank/sum": 0.0},
            "trainer-1": {"rank/sum": 1.0},
        }


async def test_leaving_closes_every_rank_and_gives_their_place_back():
    async with Fleet() as fleet:
        assert fleet.service.replicas[0].state is State.HEALTHY
    assert all(rank.closed for rank in fleet.generations[0])
    assert fleet.released == 1
