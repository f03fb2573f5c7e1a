"""The same run in one process, without a cluster: for tests, debuggers and notebooks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from grpo.cluster.handles import ActorHandle, LocalEndpoint
from grpo.cluster.plan import actor_specs
from grpo.config import RunConfig
from grpo.services import Services


@asynccontextmanager
async def launch_local(config: RunConfig, fakes: Mapping[str, Any] | None = None) -> AsyncIterator[Services]:
    """All actors of a run as objects of this process. `fakes` stand in for actors by name."""
    handles: dict[str, ActorHandle] = {}
    async with AsyncExitStack() as stack:
        for spec in actor_specs(config):
            if fakes and spec.name in fakes:
                actors = [fakes[spec.name]]
            else:
                actors = [spec.cls(**spec.kwargs) for _ in range(spec.replicas)]
                for actor in actors:
                    await actor.setup()
                    stack.push_async_callback(actor.close)
            handles[spec.name] = ActorHandle(spec.name, [LocalEndpoint(actor) for actor in actors])
        yield Services(**handles)
