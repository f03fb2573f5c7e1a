"""The same run in one process, without a cluster: for tests, debuggers and notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from grpo.cluster.endpoints import LocalEndpoint
from grpo.cluster.handles import ActorHandle
from grpo.cluster.plan import ActorSpec, actor_specs
from grpo.cluster.replicas import Claims
from grpo.cluster.services import make_service
from grpo.config import RunConfig
from grpo.failures import Failures
from grpo.services import Services
from grpo.structured import together

_CLOSE_TIMEOUT_S = 5.0


@asynccontextmanager
async def launch_local(
    config: RunConfig, failures: Failures, fakes: Mapping[str, Any] | None = None
) -> AsyncIterator[Services]:
    """All actors of a run as objects of this process; a trainer is one rank here, which computes the same.

    `fakes` stand in for actors by name; one that is a function is called for each replica.
    """
    config = replace(config, trainer=replace(config.trainer, ranks=1))
    claims = Claims()
    services = {
        spec.name: make_service(spec, partial(_spawn, spec, (fakes or {}).get(spec.name)), failures, config, claims)
        for spec in actor_specs(config)
    }
    try:
        await together(*(service.ready() for service in services.values()))
        yield Services(**{name: ActorHandle(service) for name, service in services.items()})
    finally:
        await asyncio.gather(*(service.close(_CLOSE_TIMEOUT_S) for service in services.values()))


def _spawn(spec: ActorSpec, fake: Any, name: str) -> LocalEndpoint:
    actor = spec.cls(**spec.kwargs) if fake is None else fake() if callable(fake) else fake
    return LocalEndpoint(actor, name)
