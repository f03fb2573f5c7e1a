"""Brings the actors up on Ray and takes them down again."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from grpo.cluster.endpoints import Endpoint
from grpo.cluster.files import carried
from grpo.cluster.gang import Gang
from grpo.cluster.handles import ActorHandle
from grpo.cluster.joining import nodes_at
from grpo.cluster.own_code import runtime_env
from grpo.cluster.placement import Node, check_placement
from grpo.cluster.places import Places
from grpo.cluster.plan import ActorSpec, actor_specs
from grpo.cluster.ray_actor import RayEndpoint, host_class, name_of
from grpo.cluster.reaper import session_reaper
from grpo.cluster.replicas import Claims, State
from grpo.cluster.services import Service, make_service
from grpo.config import ClusterConfig, RunConfig
from grpo.failures import Failures
from grpo.services import Services, methods_marked
from grpo.structured import together, within
from grpo.types import ConfigError, LaunchError

_CLOSE_TIMEOUT_S = 5.0
_DASHBOARD_PACKAGES = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client")  # some of ray[default]
_CALLS_PER_ACTOR = 10_000  # concurrent calls: more than tickets, so none queues inside Ray


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[str | None]:
    """Join the cluster at `cluster.address`, or start one on this machine that ends with the run, however that ends.

    Gives the address of the dashboard where `cluster.dashboard` started one. Raises LaunchError when there is no
    cluster at that address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour that Ray announces
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # those of cancelled calls
    # Freed objects give their memory back at once, not once a second: the next weights find its pages mapped, and
    # copying into fresh ones takes six times as long.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    with session_reaper():
        try:
            with _signals_held_back():
                dashboard = _connect(config)
            yield dashboard
        finally:
            ray.shutdown()


def check_dashboard(config: ClusterConfig) -> None:
    """Raise ConfigError when it is wanted and Ray came without it."""
    if config.dashboard and not all(map(importlib.util.find_spec, _DASHBOARD_PACKAGES)):
        raise ConfigError("is not installed: pip install -e '.[dashboard]'", key="cluster.dashboard")


def _connect(config: ClusterConfig) -> str | None:
    address = config.address
    if address is not None:
        nodes_at(address)
    try:
        with TemporaryDirectory() as empty:
            there = ray.init(
                address=address or "local",
                include_dashboard=None if address else config.dashboard,
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env(empty) if address else None,
                log_to_driver=True,  # into the run's log: the driver's own stdout leads there
                logging_level=logging.WARNING,
            )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # of versions that differ, it lists them line by line
        raise LaunchError(f"cluster.address: can't reach Ray at {address or 'local'}: {reason}") from error
    except SystemExit as ended:  # by Ray's handler of SIGTERM, which it puts in the place of ours
        raise KeyboardInterrupt from ended
    return f"http://{there.dashboard_url}" if config.dashboard else None


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait: interrupted half-way, `ray.init` leaves processes behind."""
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


@asynccontextmanager
async def launch(config: RunConfig, failures: Failures) -> AsyncIterator[Services]:
    """All actors of a run, set up; see `launch_actors`."""
    async with launch_actors(actor_specs(config), config, failures) as handles:
        yield Services(**handles)


@asynccontextmanager
async def launch_actors(
    specs: Sequence[ActorSpec], config: RunConfig, failures: Failures
) -> AsyncIterator[dict[str, ActorHandle]]:
    """These actors by name, set up, and replaced when they die. Leaving the block ends every one of their processes.

    Raises LaunchError when the cluster can't hold them, or when they are not up within `cluster.start_timeout_s`.
    """
    nodes = _nodes()
    check_placement(specs, list(nodes.values()), "the Ray cluster")
    if config.cluster.address is not None:
        specs = _for_other_nodes(specs, config)
    services: dict[str, Service] = {}
    claims, places = Claims(), Places()
    patience_s = _CLOSE_TIMEOUT_S
    try:
        async with within(config.cluster.start_timeout_s, partial(_late, specs, services, config.cluster)):
            await places.reserve(specs, nodes)
            for spec in specs:
                services[spec.name] = make_service(spec, partial(_spawn, spec, places), failures, config, claims)
            await together(*(service.ready() for service in services.values()))
        yield {name: ActorHandle(service) for name, service in services.items()}
    except asyncio.CancelledError:
        patience_s = 0.0  # somebody pressed Ctrl-C twice
        raise
    finally:
        places.release()
        await asyncio.gather(*(service.close(patience_s) for service in services.values()))


def _for_other_nodes(specs: Sequence[ActorSpec], config: RunConfig) -> list[ActorSpec]:
    """The same actors, whose processes bring along the files that they need."""
    sent = {"config": carried(config, ray.get_runtime_context().get_node_id())}
    return [replace(spec, kwargs={**spec.kwargs, **sent}) if "config" in spec.kwargs else spec for spec in specs]


def _nodes() -> dict[str, Node]:
    """Those of the cluster, by id."""
    there = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {name: Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for name, resources in there.items()}


def _spawn(spec: ActorSpec, places: Places, name: str) -> Endpoint:
    if spec.ranks > 1:
        return _spawn_gang(spec, places.take(spec), name)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _start(spec, name, spec.kwargs, here if spec.beside else "DEFAULT")


def _spawn_gang(spec: ActorSpec, place: PlacementGroup, name: str) -> Gang:
    """All ranks find their places or none."""
    ranks = [
        _start(spec, f"{name}-{rank}", {**spec.kwargs, "rank": rank}, PlacementGroupSchedulingStrategy(place, rank))
        for rank in range(spec.ranks)
    ]
    return Gang(ranks, partial(remove_placement_group, place), methods_marked(spec.cls, "of_rank_0"))


def _start(spec: ActorSpec, name: str, kwargs: Mapping[str, Any], where: Any) -> RayEndpoint:
    remote = host_class(spec.cls).options(
        num_cpus=spec.num_cpus, num_gpus=spec.num_gpus, max_concurrency=_CALLS_PER_ACTOR, scheduling_strategy=where
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
