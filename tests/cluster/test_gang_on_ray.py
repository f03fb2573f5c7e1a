"""Ranks that are processes: they get a place together, and leave it together."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest
from ray.util import placement_group, placement_group_table, remove_placement_group

from grpo.actors.specs import ActorSpec
from grpo.cluster.launch import _spawn, cluster_nodes, launch_actors
from grpo.cluster.placement import RankGroups
from grpo.config.schema import RunConfig
from grpo.errors import ActorDied, LaunchError
from grpo.services.failures import Failures
from tests.fakes import MeetingRank

pytestmark = pytest.mark.usefixtures("ray_session")

SPEC = ActorSpec("trainer", MeetingRank, num_cpus=0.5, ranks=2)


@pytest.fixture
def states():
    """Gives the states of the places that were asked for since."""
    before = placement_group_table().keys()
    return lambda: [place["state"] for name, place in placement_group_table().items() if name not in before]


def too_large_for_two():
    return replace(SPEC, num_cpus=0.75 * len(os.sched_getaffinity(0)))


async def until_dead(process):
    with pytest.raises(ActorDied):
        await asyncio.wait_for(process.wait_dead(), 120)


async def test_ranks_meet_and_are_ended_together_with_their_place(states):
    gang = _spawn(SPEC, RankGroups(), "trainer")
    await gang.wait_scheduled()
    await gang.call("setup")
    assert states() == ["CREATED"]
    assert await gang.call("meet", ("hi",)) == ["0 heard hi from 1", "1 heard hi from 0"]
    assert [process.name for process in gang.processes()] == ["trainer-0", "trainer-1"]
    assert len({process.pid for process in gang.processes()}) == 2
    payloads = [payload for payload, _ in await gang.call("make", (3,))]
    assert await gang.call("total_of", (tuple(payloads),)) == [3 + 6, 3 + 6]
    gang.kill()
    await asyncio.gather(*map(until_dead, gang.processes()))
    assert states() == ["REMOVED"]
    gang.kill()  # which may come twice


async def test_ranks_find_their_places_together_or_not_at_all(states):
    """There is room for one of two; while they wait for it, they can be taken back."""
    gang = _spawn(too_large_for_two(), RankGroups(), "trainer")
    placed = [asyncio.ensure_future(rank.wait_scheduled()) for rank in gang.processes()]
    assert await asyncio.wait(placed, timeout=1.0) == (set(), set(placed))
    assert states() == ["PENDING"]
    gang.kill(hung=True)
    for each in placed:
        with pytest.raises(ActorDied):
            await asyncio.wait_for(each, 120)
    assert states() == ["REMOVED"]


async def test_a_rank_that_is_killed_in_a_collective_is_the_death_of_all(states):
    gang = _spawn(SPEC, RankGroups(), "trainer")
    await gang.wait_scheduled()
    await gang.call("setup")
    meeting = asyncio.ensure_future(gang.call("wait_for_the_other"))
    hears_of_it = asyncio.ensure_future(gang.wait_dead())
    first, second = gang.processes()
    await first.invoke("waits")
    os.kill(second.pid, signal.SIGKILL)
    for call in (meeting, hears_of_it):
        with pytest.raises(ActorDied):
            await asyncio.wait_for(call, 120)
    gang.kill(hung=True)
    await until_dead(first)
    assert states() == ["REMOVED"]


async def test_a_reserved_place_is_taken_once(states):
    groups = RankGroups()
    await groups.reserve([SPEC], cluster_nodes())
    assert states() == ["CREATED"]
    gangs = [_spawn(SPEC, groups, "trainer") for _ in range(2)]
    assert len(states()) == 2
    for gang in gangs:
        gang.kill()
    assert states() == ["REMOVED"] * 2


async def test_ranks_that_get_no_place_in_time_are_named_and_wait_for_it_no_longer(states):
    config = RunConfig()
    config.cluster.start_timeout_s = 0.2
    held = placement_group([{"CPU": len(os.sched_getaffinity(0)) - 0.5}])
    await held.ready()
    with pytest.raises(LaunchError, match=r"cluster.start_timeout_s: trainer not up after 0.2 s"):
        async with launch_actors([SPEC], config, Failures(config.recovery)):
            pass
    remove_placement_group(held)
    assert states() == ["REMOVED"] * 2
