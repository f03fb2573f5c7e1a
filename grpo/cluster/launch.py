"""Brings the actors up on Ray and takes them down again."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import ray

from grpo.cluster.handles import ActorHandle
from grpo.cluster.plan import ActorSpec, actor_specs, check_capacity
from grpo.cluster.ray_actor import RayEndpoint, host_class
from grpo.config import ClusterConfig, RunConfig
from grpo.services import Services
from grpo.types import LaunchError

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
_CALLS_PER_ACTOR = 10_000  # concurrent calls: more than tickets, so none queues inside Ray


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster at `cluster.address`, or start one on this machine that ends with the run."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour that Ray announces
    try:
        ray.init(
            address=config.address or "local",
            include_dashboard=None if config.address else False,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LaunchError(f"cluster.address: can't reach Ray at {config.address or 'local'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@asynccontextmanager
async def launch(config: RunConfig) -> AsyncIterator[Services]:
    """All actors of a run, set up. Leaving the block ends every one of their processes.

    Raises LaunchError when the cluster can't hold them, or when they are not up within `cluster.start_timeout_s`.
    """
    specs = actor_specs(config)
    there = ray.cluster_resources()
    check_capacity(specs, there.get("CPU", 0.0), there.get("GPU", 0.0), "the Ray cluster")
    handles = {spec.name: _start(spec) for spec in specs}
    try:
        await _set_up(list(handles.values()), config.cluster.start_timeout_s)
        yield Services(**{"reference": None, **handles})
    finally:
        await _take_down(list(handles.values()))


def _start(spec: ActorSpec) -> ActorHandle:
    names = [spec.name] if spec.replicas == 1 else [f"{spec.name}-{i}" for i in range(spec.replicas)]
    remote = ray.remote(host_class(spec.cls)).options(
        num_cpus=spec.num_cpus, num_gpus=spec.num_gpus, max_concurrency=_CALLS_PER_ACTOR
    )
    endpoints = [RayEndpoint(name, spec.cls, remote.remote(spec.cls, dict(spec.kwargs))) for name in names]
    return ActorHandle(spec.name, endpoints)


async def _set_up(handles: Sequence[ActorHandle], timeout_s: float) -> None:
    starting = {asyncio.ensure_future(handle.setup.fanout()): handle.name for handle in handles}
    try:
        done, pending = await asyncio.wait(starting, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if pending:
            late = ", ".join(starting[task] for task in pending)
            free = ray.available_resources()
            raise LaunchError(
                f"cluster.start_timeout_s: {late} not up after {timeout_s:g} s; the cluster has "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free, another job may hold the rest"
            )
    finally:
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)


async def _take_down(handles: Sequence[ActorHandle]) -> None:
    """Ask every actor to close, then end its process whether it did or not."""
    closing = [asyncio.ensure_future(handle.close.fanout()) for handle in handles]
    await asyncio.wait(closing, timeout=_CLOSE_TIMEOUT_S)
    for handle, task in zip(handles, closing, strict=True):
        if not task.done():
            log.warning("%s did not close within %g s", handle.name, _CLOSE_TIMEOUT_S)
        elif not task.cancelled() and (error := task.exception()):
            log.warning("%s did not close: %s", handle.name, error)
        task.cancel()
    await asyncio.gather(*closing, return_exceptions=True)
    for handle in handles:
        for endpoint in handle.endpoints:
            ray.kill(endpoint.actor)
