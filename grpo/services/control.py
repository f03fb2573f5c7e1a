"""An operator's door to a run that is going on: a socket in its folder, to look at its replicas and to scale them.

A line of JSON goes in, `{"scale": {"generator": 3}}`, and one comes out, `{"replicas": {...}}` or `{"error": "..."}`.
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
SCALABLE = ("generator", "evaluator", "reward", "reference")  # the services of interchangeable replicas
_NAME = "control.sock"


@asynccontextmanager
async def open_to_operators(folder: Path, services: Services) -> AsyncIterator[None]:
    """Answer requests while the block runs. Whoever may write to the folder may ask."""
    async with AsyncExitStack() as stack:
        try:
            (folder / _NAME).unlink(missing_ok=True)  # of a run that was killed
            with _short(folder) as path:
                server = await asyncio.start_unix_server(partial(_serve, services), path)
        except OSError as error:  # not every file system has sockets, and a run can do without
            log.warning("no scaling while the run goes on, its folder takes no socket: %s", error)
        else:
            stack.callback((folder / _NAME).unlink, missing_ok=True)
            stack.callback(server.close)
        yield


async def ask(folder: Path, scale: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Scale services of the run in `folder`, and return what every replica looks like then, by name.

    Raises ControlError when no run is going on there, or it refuses.
    """
    try:
        with _short(folder) as path:
            reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise ControlError(f"no run is going on in {folder}") from error
    writer.write(json.dumps({"scale": dict(scale)}).encode() + b"\n")
    reply = json.loads(await reader.readline())
    writer.close()
    if "error" in reply:
        raise ControlError(reply["error"])
    replicas: dict[str, dict[str, Any]] = reply["replicas"]
    return replicas


async def _serve(services: Services, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):  # who asked may have left
        while line := await reader.readline():
            writer.write(json.dumps(_answer(services, line)).encode() + b"\n")
            await writer.drain()
    writer.close()


def _answer(services: Services, line: bytes) -> dict[str, Any]:
    try:
        wanted: dict[str, int] = {name: int(count) for name, count in json.loads(line)["scale"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"error": f"can't read {line!r}"}
    there = {name: getattr(services, name) for name in SCALABLE if getattr(services, name) is not None}
    for name, count in wanted.items():
        if name not in there:
            return {"error": f"{name} can't be scaled; this run has {', '.join(there)}"}
        if count < 1:
            return {"error": f"{name}={count}: at least 1 has to stay"}
    for name, count in wanted.items():
        there[name].scale(count)
    return {"replicas": services.replica_stats()}


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A path to the socket of at most 108 bytes, all that the kernel takes, however long the folder's is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{_NAME}"
    finally:
        os.close(descriptor)
