"""Control socket of a running training: show its replicas, and scale its services.

The socket is in the run folder. A request is a line of JSON, `{"scale": {"generator": 3}}`; so is the answer,
`{"replicas": {...}}` or `{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from grpo.errors import ControlError
from grpo.services.handle import Services

log = logging.getLogger(__name__)
SCALABLE = ("generator", "evaluator", "reward", "environment", "reference")  # the services of interchangeable replicas
_NAME = "control.sock"


@asynccontextmanager
async def open_to_operators(folder: Path, services: Services) -> AsyncIterator[None]:
    """Answer requests while the block runs, from anyone who may write to the folder."""
    async with AsyncExitStack() as stack:
        try:
            (folder / _NAME).unlink(missing_ok=True)  # left by a run that was killed
            with _short_path(folder) as path:
                server = await asyncio.start_unix_server(partial(_serve, services), path)
        except OSError as error:  # not every file system has sockets, and a run can do without
            log.warning("this run can't be scaled: no socket in its folder: %s", error)
        else:
            stack.callback((folder / _NAME).unlink, missing_ok=True)
            stack.callback(server.close)
        yield


async def ask(folder: Path, scale: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Scale services of the run in `folder`, and return the statistics of every replica by its name.

    Raises ControlError when no run is active in the folder, or when the run refuses.
    """
    try:
        with _short_path(folder) as path:
            reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise ControlError(f"no run is active in {folder}") from error
    writer.write(json.dumps({"scale": dict(scale)}).encode() + b"\n")
    reply = json.loads(await reader.readline())
    writer.close()
    if "error" in reply:
        raise ControlError(reply["error"])
    replicas: dict[str, dict[str, Any]] = reply["replicas"]
    return replicas


async def _serve(services: Services, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):  # the client may disconnect before its answer
        while line := await reader.readline():
            writer.write(json.dumps(_answer(services, line)).encode() + b"\n")
            await writer.drain()
    writer.close()


def _answer(services: Services, request: bytes) -> dict[str, Any]:
    try:
        wanted: dict[str, int] = {name: int(count) for name, count in json.loads(request)["scale"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"error": f"can't read {request!r}"}
    scalable = {name: getattr(services, name) for name in SCALABLE if getattr(services, name) is not None}
    for name, count in wanted.items():
        if name not in scalable:
            return {"error": f"{name}: can't be scaled. Scalable services of this run: {', '.join(scalable)}"}
        if count < 1:
            return {"error": f"{name}: must be >= 1 ({count})"}
    for name, count in wanted.items():
        scalable[name].scale(count)
    stats_by_actor = services.replica_stats().values()
    return {"replicas": {name: stats for replicas in stats_by_actor for name, stats in replicas.items()}}


@contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """Give a path to the socket that fits into the kernel's limit of 108 bytes, however long the folder's path is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{_NAME}"
    finally:
        os.close(descriptor)
