"""Launch the actors on Ray, and end them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from grpo.actors.marks import methods_marked
from grpo.actors.specs import ActorSpec, actor_specs
from grpo.cluster.actor import RayEndpoint, host_class, name_of
from grpo.cluster.placement import Node, RankGroups, check_placement
from grpo.cluster.shipping import ship_config
from grpo.config.operation import ClusterConfig
from grpo.config.schema import RunConfig
from grpo.errors import LaunchError
from grpo.services.endpoint import Endpoint, Gang
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle, Services
from grpo.services.replica import PreemptionState, State
from grpo.services.service import Service, make_service
from grpo.utils.aio import gather_or_cancel, timeout_as

_CLOSE_TIMEOUT_S = 5.0
_CALLS_PER_ACTOR = 10_000  # concurrent calls: more than tickets, so none queues inside Ray


@asynccontextmanager
async def launch(config: RunConfig, failures: Failures) -> AsyncIterator[Services]:
    """Launch all actors of a run; see `launch_actors`."""
    async with launch_actors(actor_specs(config), config, failures) as handles:
        yield Services(**handles)


@asynccontextmanager
async def launch_actors(
    specs: Sequence[ActorSpec], config: RunConfig, failures: Failures
) -> AsyncIterator[dict[str, ActorHandle]]:
    """Launch actors, set them up, and give their handles by name. The end of the block ends all of their processes.

    Raises LaunchError when the cluster can't hold them, or when they are not up within `cluster.start_timeout_s`.
    """
    nodes = cluster_nodes()
    check_placement(specs, list(nodes.values()), "the Ray cluster")
    if config.cluster.address is not None:  # processes on other nodes bring along the files that they need
        shipped = {"config": ship_config(config, ray.get_runtime_context().get_node_id())}
        specs = [replace(s, kwargs={**s.kwargs, **shipped}) if "config" in s.kwargs else s for s in specs]
    services: dict[str, Service] = {}
    preemption, groups = PreemptionState(), RankGroups()
    patience_s = _CLOSE_TIMEOUT_S
    try:
        async with timeout_as(config.cluster.start_timeout_s, partial(_late, specs, services, config.cluster)):
            # Ranks first: other actors would take a part of the room on every node.
            await groups.reserve(specs, nodes)
            for spec in specs:
                services[spec.name] = make_service(spec, partial(_spawn, spec, groups), failures, config, preemption)
            await gather_or_cancel(*(service.ready() for service in services.values()))
        yield {name: ActorHandle(service) for name, service in services.items()}
    except asyncio.CancelledError:
        patience_s = 0.0  # Ctrl-C was pressed twice
        raise
    finally:
        groups.release()
        await asyncio.gather(*(service.close(patience_s) for service in services.values()))


def cluster_nodes() -> dict[str, Node]:
    """Return the living nodes of the cluster, by id."""
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {name: Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for name, resources in alive.items()}


def _spawn(spec: ActorSpec, groups: RankGroups, name: str) -> Endpoint:
    if spec.ranks == 1:
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return _start_process(spec, name, spec.kwargs, driver_node if spec.on_driver_node else "DEFAULT")
    group = groups.pop(spec)
    ranks = [
        _start_process(
            spec, f"{name}-{rank}", {**spec.kwargs, "rank": rank}, PlacementGroupSchedulingStrategy(group, rank)
        )
        for rank in range(spec.ranks)
    ]
    return Gang(ranks, partial(remove_placement_group, group), methods_marked(spec.cls, "rank_zero_only"))


def _start_process(spec: ActorSpec, name: str, kwargs: Mapping[str, Any], strategy: Any) -> RayEndpoint:
    remote = host_class(spec.cls).options(
        num_cpus=spec.num_cpus, num_gpus=spec.num_gpus, max_concurrency=_CALLS_PER_ACTOR, scheduling_strategy=strategy
    )
    return RayEndpoint(name, spec.cls, remote.remote(name, name_of(spec.cls), dict(kwargs)))


def _late(specs: Sequence[ActorSpec], services: Mapping[str, Service], config: ClusterConfig) -> LaunchError:
    starting = [
        name
        for name, service in services.items()
        if any(replica.state is State.STARTING and not replica.optional for replica in service.replicas)
    ]
    reserving = [spec.name for spec in specs if spec.ranks > 1 and spec.name not in services]
    free = ray.available_resources()
    return LaunchError(
        f"cluster.start_timeout_s: {', '.join(starting or reserving)} not up after {config.start_timeout_s:g} s; the "
        f"cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free, another job may hold the rest"
    )
