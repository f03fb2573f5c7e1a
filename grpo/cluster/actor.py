"""Host an actor in a Ray process, and call it: payloads go by reference, errors keep their type."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache, cached_property
from pkgutil import resolve_name
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from grpo.cluster.shipping import ShippedConfig
from grpo.errors import ActorDied, PayloadLost
from grpo.services.call_batching import Answers, Arguments, BatchRunner, CallBatcher, Wire
from grpo.services.endpoint import Process, free_port
from grpo.telemetry.recording import Recording, TelemetryBatch, record_in
from grpo.utils.gc_tuning import relax_gc, restore_gc

log = logging.getLogger(__name__)


class RayEndpoint(Process):
    """The caller's side of a Ray actor that hosts an instance of `cls`. It can be sent to another actor."""

    def __init__(self, name: str, cls: type, actor: Any) -> None:
        self.name, self.actor = name, actor
        self.pid: int | None = None  # if it runs on the driver's node
        self._pidfd: int | None = None  # unlike the pid, it can't come to mean a later process
        self._cls = cls
        self._copies: dict[str, LatestCopy] = {}  # of payloads, by the method that returned them
        self._batchers: dict[str, CallBatcher] = {}  # by method

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it takes to call the process from another one, where all copies are one: they batch calls."""
        return _endpoint, (self.name, self._cls, self.actor)

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        implementation = getattr(self._cls, method, None)
        if hasattr(implementation, "batched"):
            return await self._batcher(method).call(args, kwargs or {})
        references: list[ray.ObjectRef] = []
        args, kwargs = _hoist_all((args, kwargs or {}), references)
        returns_payload = hasattr(implementation, "returns_payload")
        remote = self.actor.invoke.options(num_returns=2 if returns_payload else 1, name=f"{self.name}.{method}")
        if not returns_payload:
            return await self._result(remote.remote((method, args, kwargs), *references))
        payload, report = remote.remote((method, args, kwargs), *references)
        result = payload, await self._result(report)
        if hasattr(implementation, "copied_to_driver"):
            # Arrays in the copy are mapped, not read. While it is held, the payload's reference stays valid even when
            # the node that made it is lost.
            self._copies.setdefault(method, LatestCopy(f"{self.name}.{method}")).fetch(payload)
        return result

    def _batcher(self, method: str) -> CallBatcher:
        """Return the batcher of a method; each of the three calls bears the method's name."""
        name = f"{self.name}.{method}"

        async def run(caller: str, calls: Mapping[int, Arguments]) -> Answers:
            references: list[ray.ObjectRef] = []
            hoisted = {number: _hoist_all(arguments, references) for number, arguments in calls.items()}
            remote = self.actor.invoke_batch.options(name=name)
            answers: Answers = await self._result(remote.remote((caller, method, hoisted), *references))
            return answers

        async def late_answers(caller: str) -> Answers:
            answers: Answers = await self._result(self.actor.late_answers.options(name=name).remote(caller))
            return answers

        async def error(caller: str, number: int) -> None:
            await self._result(self.actor.batched_error.options(name=name).remote(caller, number))

        if method not in self._batchers:
            self._batchers[method] = CallBatcher(Wire(run, late_answers, error))
        return self._batchers[method]

    async def wait_scheduled(self) -> None:
        node, pid = await self._result(self.actor.where.remote())
        if node == ray.get_runtime_context().get_node_id():
            with suppress(AttributeError, ProcessLookupError):  # not every system has pidfds; or it just died
                self._pidfd = os.pidfd_open(pid)
            self.pid = pid

    async def rendezvous(self) -> tuple[str, int]:
        host, port = await self._result(self.actor.rendezvous.remote())
        return host, port

    async def ping(self) -> None:
        await self._result(self.actor.ping.remote())

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        batch: TelemetryBatch = await self._result(self.actor.drain.remote(keep_recording))
        return batch

    async def wait_dead(self) -> NoReturn:
        await self._result(self.actor.never_return.remote())
        raise ActorDied(f"{self.name} ended")

    def kill(self, *, hung: bool = False) -> None:
        ray.kill(self.actor)
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                if hung:  # Ray asks a process to end itself
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = None

    async def _result(self, reference: ray.ObjectRef) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise self._payload_lost(error.cause) from error
            raise error.cause from error
        except RayActorError as error:
            raise ActorDied(f"{self.name} died: {_first_line(error)}") from error
        except ObjectLostError as error:
            raise self._payload_lost(error) from error

    def _payload_lost(self, error: ObjectLostError) -> PayloadLost:
        what_happened, *_how_to_debug_it = _first_line(error).split(". ")
        return PayloadLost(f"{self.name}: {what_happened}")


_endpoints: WeakValueDictionary[str, RayEndpoint] = WeakValueDictionary()  # that were sent to this process


def _endpoint(name: str, cls: type, actor: Any) -> RayEndpoint:
    key = actor._actor_id.hex()
    if (endpoint := _endpoints.get(key)) is None:
        _endpoints[key] = endpoint = RayEndpoint(name, cls, actor)
    return endpoint


def _first_line(error: RayError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@cache
def host_class(cls: type) -> Any:
    """Return the Ray class whose processes host an instance of `cls`, under the same name in Ray's dashboard.

    It is cached, since Ray pickles every new class, which blocks the event loop.
    """
    return ray.remote(type(cls.__name__, (_Host,), {}))


def name_of(cls: type) -> str:
    """Return the name by which a process imports the class."""
    return f"{cls.__module__}:{cls.__qualname__}"


class _Host:
    """The actor's side: a process that holds the actor, which is built at its first call."""

    def __init__(self, name: str, cls: str, kwargs: dict[str, Any]) -> None:
        relax_gc()  # before the class's module is imported, so the class comes by name
        self._name = name
        self._cls, self._kwargs = resolve_name(cls), kwargs
        self._recording = Recording()
        self._batches = BatchRunner()

    @cached_property
    def _actor(self) -> Any:
        return self._cls(**self._kwargs)

    def __repr__(self) -> str:
        """Return the name of the process in Ray's dashboard and logs."""
        return self._name

    async def invoke(self, call: tuple[str, tuple[Any, ...], dict[str, Any]], *payloads: Any) -> Any:
        """Call a method. `call` is method, arguments and keyword arguments, in one since Ray pickles each by itself."""
        record_in(self._recording)
        method, args, kwargs = call
        args = tuple(_insert(arg, payloads) for arg in args)
        kwargs = {name: _insert(arg, payloads) for name, arg in kwargs.items()}
        if method == "setup":
            # Not in the constructor: `where` has to answer meanwhile that the process runs.
            self._kwargs = await asyncio.to_thread(_localize, self._kwargs)
        if method == "close" and "_actor" not in vars(self):
            return None  # it was not built yet
        if method in ("setup", "close") and not hasattr(self._actor, method):
            result = None
        else:
            result = await getattr(self._actor, method)(*args, **kwargs)
        if method == "setup":
            restore_gc()
        return result

    async def invoke_batch(self, calls: tuple[str, str, Mapping[int, Arguments]], *payloads: Any) -> Answers:
        """Make several calls of a method for a caller, by number; see BatchRunner."""
        caller, method, arguments = calls
        return await self._batches.run(
            caller, {number: self.invoke((method, *each), *payloads) for number, each in arguments.items()}
        )

    async def late_answers(self, caller: str) -> Answers:
        return await self._batches.late_answers(caller)

    async def batched_error(self, caller: str, number: int) -> None:
        await self._batches.error(caller, number)

    async def where(self) -> tuple[str, int]:
        """Return the ids of the node and of the process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def rendezvous(self) -> tuple[str, int]:
        """Return an address of this node that other nodes reach, and a port that is free here."""
        return ray.util.get_node_ip_address(), free_port()

    async def ping(self) -> None:
        """Return when the actor answers. An actor with a process behind it has a `ping` that asks that process."""
        if hasattr(self._actor, "ping"):
            await self._actor.ping()

    async def drain(self, keep_recording: bool) -> TelemetryBatch:
        return self._recording.drain(keep_recording=keep_recording)

    async def never_return(self) -> None:
        """Wait until the process dies, which raises an error at the caller."""
        await asyncio.get_running_loop().create_future()


def _localize(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for this node, once the files they name are here."""
    return {name: arg.localize() if isinstance(arg, ShippedConfig) else arg for name, arg in kwargs.items()}


class LatestCopy:
    """Holds the newest payload that has arrived on this node. One payload is under way at a time.

    Payloads may be made faster than they travel: while one is under way, only the newest of the others waits.
    """

    def __init__(self, name: str) -> None:
        self.held: Any = None
        self._name = name
        self._fetching: asyncio.Future[Any] | None = None
        self._next: Awaitable[Any] | None = None

    def fetch(self, payload: Awaitable[Any]) -> None:
        """Fetch a payload by awaiting it, after the one that is under way."""
        self._next = payload
        if self._fetching is None:
            self._fetch_next()

    def _fetch_next(self) -> None:
        payload, self._next, self._fetching = self._next, None, None
        if payload is not None:
            self._fetching = asyncio.ensure_future(payload)
            self._fetching.add_done_callback(self._arrived)

    def _arrived(self, fetching: asyncio.Future[Any]) -> None:
        if fetching.cancelled():  # the event loop ends
            return
        if (error := fetching.exception()) is None:
            self.held = fetching.result()
        else:
            log.warning("%s: no copy on the driver's node: %s", self._name, error)
        self._fetch_next()


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands in an argument for a reference that is sent at the top level, where Ray resolves it."""

    index: int


def _hoist_all(arguments: Arguments, references: list[ray.ObjectRef]) -> Arguments:
    args, kwargs = arguments
    return (
        tuple(_hoist(arg, references) for arg in args),
        {name: _hoist(arg, references) for name, arg in kwargs.items()},
    )


def _hoist(arg: Any, references: list[ray.ObjectRef]) -> Any:
    """Replace the references in an argument, or in its items or fields, by slots; append them to `references`."""
    if isinstance(arg, ray.ObjectRef):
        references.append(arg)
        return _Slot(len(references) - 1)
    return _map_inside(arg, ray.ObjectRef, lambda each: _hoist(each, references))


def _insert(arg: Any, payloads: tuple[Any, ...]) -> Any:
    """Put the payloads into the slots, the inverse of `_hoist`."""
    if isinstance(arg, _Slot):
        return payloads[arg.index]
    return _map_inside(arg, _Slot, lambda each: _insert(each, payloads))


def _map_inside(arg: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert the items of a tuple, or the fields of a dataclass that are of a kind."""
    if type(arg) is tuple:
        return tuple(map(convert, arg))
    if dataclasses.is_dataclass(arg) and not isinstance(arg, type):
        converted = {name: convert(value) for name, value in vars(arg).items() if isinstance(value, kind)}
        return dataclasses.replace(arg, **converted) if converted else arg
    return arg
