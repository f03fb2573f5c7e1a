"""The driver of test_placement.py, on a cluster of two nodes of two CPUs: prints on which nodes ranks find places."""

import asyncio
import json
import sys
from contextlib import suppress

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from grpo.actors.specs import ActorSpec
from grpo.cluster.launch import cluster_nodes, launch_actors
from grpo.cluster.placement import RankGroups
from grpo.config.schema import RunConfig
from grpo.services.failures import Failures
from tests.fakes import MeetingRank, Worker

GENERATOR = ActorSpec("generator", Worker, replicas=2, num_cpus=1)
TRAINER = ActorSpec("trainer", MeetingRank, num_cpus=1, ranks=2)


async def one_cpu_of_each_node():
    """As another job may hold them."""
    held = placement_group([{"CPU": 1}] * 2, "STRICT_SPREAD")
    await held.ready()
    return held


async def nodes_of_another(held, state):
    """Those of the place that somebody else asked for, or will, when it is in this state."""
    while True:
        for name, place in placement_group_table().items():
            if name != held.id.hex() and place["state"] == state:
                return list(place["bundles_to_node_id"].values())
        await asyncio.sleep(0.01)


async def beside_generators():
    """They are in the plan first, and would find room while the ranks wait for theirs."""
    held = await one_cpu_of_each_node()
    config = RunConfig()

    async def launched():
        async with launch_actors([GENERATOR, TRAINER], config, Failures(config.recovery)):
            raise AssertionError("it is cancelled before")

    launching = asyncio.ensure_future(launched())
    await nodes_of_another(held, "PENDING")
    remove_placement_group(held)
    found = await nodes_of_another(held, "CREATED")
    launching.cancel()
    with suppress(asyncio.CancelledError):
        await launching
    return found


async def where_others_hold_room():
    held, groups = await one_cpu_of_each_node(), RankGroups(patience_s=0.1)
    await groups.reserve([TRAINER], cluster_nodes())
    place = groups.pop(TRAINER)
    found = list(placement_group_table(place)["bundles_to_node_id"].values())
    for each in (held, place):
        remove_placement_group(each)
    return found


async def main():
    ray.init(sys.argv[1])
    found = {"others hold room": await where_others_hold_room(), "beside generators": await beside_generators()}
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
