"""Copies that are brought to this node, of payloads that are made faster than they travel."""

# MERGED: Method calls to a Ray actor: payloads by reference, errors with their own type.

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

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from grpo.cluster.shipping import CarriedConfig
from grpo.errors import ActorDied, PayloadLost
from grpo.services.call_batching import Answers, Arguments, BatchedWork, CallBatcher
from grpo.services.endpoint import Process, free_port
from grpo.telemetry.recording import Recording, TelemetryBatch, record_in
from grpo.utils.gc_tuning import relax_gc, restore_gc


class LatestCopy:
    """Holds on to a payload that has arrived until a newer one is here; one is under way at a time.

    Meanwhile only the newest waits its turn: those that it takes the place of are let go. `failed` is told why a
    payload did not arrive.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self.held: Any = None
        self._failed = failed
        self._coming: asyncio.Future[Any] | None = None
        self._waiting: Awaitable[Any] | None = None

    def bring(self, payload: Awaitable[Any]) -> None:
        """Have the copy made: `payload` gives it when it is awaited."""
        self._waiting = payload
        if self._coming is None:
            self._go_on()

    def _go_on(self) -> None:
        payload, self._waiting, self._coming = self._waiting, None, None
        if payload is not None:
            self._coming = asyncio.ensure_future(payload)
            self._coming.add_done_callback(self._arrived)

    def _arrived(self, copying: asyncio.Future[Any]) -> None:
        if copying.cancelled():  # the event loop ends
            return
        if (error := copying.exception()) is None:
            self.held = copying.result()
        else:
            self._failed(error)
        self._go_on()


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands in an argument for a reference that travels beside it, at the top level, where Ray resolves it."""

    index: int


@cache
def host_class(cls: type) -> Any:
    """Ray's class of the processes that host an instance of `cls`, under the same name in its dashboard.

    Made once: Ray pickles it anew for every other class, which blocks the event loop.
    """
    return ray.remote(type(cls.__name__, (_Host,), {}))


def name_of(cls: type) -> str:
    """By which a process finds the class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _unpacked(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What another node has sent, with the files that belong to it."""
    return {name: arg.here() if isinstance(arg, CarriedConfig) else arg for name, arg in kwargs.items()}


class _Host:
    def __init__(self, name: str, cls: str, kwargs: dict[str, Any]) -> None:
        relax_gc()  # before the class's module is imported: hence its name
        self._name = name
        self._cls, self._kwargs = resolve_name(cls), kwargs
        self._recording = Recording()
        self._gathered = BatchedWork()

    @cached_property
    def _actor(self) -> Any:
        return self._cls(**self._kwargs)

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call it."""
        return self._name

    async def invoke(self, call: tuple[str, tuple[Any, ...], dict[str, Any]], *payloads: Any) -> Any:
        """`call` is one argument since Ray pickles each of them apart: method, arguments, keyword arguments."""
        record_in(self._recording)
        method, args, kwargs = call
        args = tuple(_fill(arg, payloads) for arg in args)
        kwargs = {name: _fill(arg, payloads) for name, arg in kwargs.items()}
        if method == "setup":  # not as the process starts: `where` says meanwhile that it has found a place
            self._kwargs = await asyncio.to_thread(_unpacked, self._kwargs)
        result = None
        if method not in ("setup", "close") or hasattr(self._actor, method):  # an actor may lack these two
            result = await getattr(self._actor, method)(*args, **kwargs)
        if method == "setup":
            restore_gc()
        return result

    async def invoke_gathered(self, calls: tuple[str, Mapping[int, Arguments]], *payloads: Any) -> Answers:
        """Several calls of a method, by number; see BatchedWork."""
        method, arguments = calls
        return await self._gathered.answers(
            {number: self.invoke((method, *each), *payloads) for number, each in arguments.items()}
        )

    async def late(self, number: int) -> Any:
        return await self._gathered.late(number)

    async def where(self) -> tuple[str, int]:
        """The node and the process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def rendezvous(self) -> tuple[str, int]:
        """An address of this node that the others reach, and a port that is free there."""
        return ray.util.get_node_ip_address(), free_port()

    async def ping(self) -> None:
        """Returns when the actor answers: one that has a process behind it asks that too."""
        if hasattr(self._actor, "ping"):
            await self._actor.ping()

    async def drain(self, keep_recording: bool) -> TelemetryBatch:
        return self._recording.drain(keep_recording=keep_recording)

    async def linger(self) -> None:
        """Never returns: whoever calls it hears at once when the process dies."""
        await asyncio.get_running_loop().create_future()


class RayEndpoint(Process):
    """A Ray actor that hosts an instance of `cls`."""

    def __init__(self, name: str, cls: type, actor: Any) -> None:
        self.name, self.actor = name, actor
        self.pid: int | None = None  # where it runs on the driver's node
        self._process: int | None = None  # a descriptor of it, which no later process of the same number can take over
        self._cls = cls
        self._copies: dict[str, LatestCopy] = {}  # of payloads, by the method that made them
        self._gathering: dict[str, CallBatcher] = {}  # by method

    async def wait_scheduled(self) -> None:
        node, pid = await self._result(self.actor.where.remote())
        if node == ray.get_runtime_context().get_node_id():
            with suppress(AttributeError, ProcessLookupError):  # not every system has it; or it just died
                self._process = os.pidfd_open(pid)
            self.pid = pid

    async def invoke(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        implementation = getattr(self._cls, method, None)
        if hasattr(implementation, "batched"):
            return await self._gathering_of(method).call(args, kwargs or {})
        payloads: list[ray.ObjectRef] = []
        args, kwargs = _hoist_all((args, kwargs or {}), payloads)
        returns_payload = getattr(implementation, "returns_payload", False)
        remote = self.actor.invoke.options(num_returns=2 if returns_payload else 1, name=f"{self.name}.{method}")
        if returns_payload:
            payload, report = remote.remote((method, args, kwargs), *payloads)
            result = payload, await self._result(report)
            if hasattr(implementation, "copied_to_driver"):
                self._copy_of(method).bring(payload)
            return result
        return await self._result(remote.remote((method, args, kwargs), *payloads))

    async def rendezvous(self) -> tuple[str, int]:
        host, port = await self._result(self.actor.rendezvous.remote())
        return host, port

    def _gathering_of(self, method: str) -> CallBatcher:
        async def send(calls: Mapping[int, Arguments]) -> Answers:
            payloads: list[ray.ObjectRef] = []
            hoisted = {number: _hoist_all(arguments, payloads) for number, arguments in calls.items()}
            remote = self.actor.invoke_gathered.options(name=f"{self.name}.{method}")
            answers: Answers = await self._result(remote.remote((method, hoisted), *payloads))
            return answers

        async def late(number: int) -> Any:
            return await self._result(self.actor.late.options(name=f"{self.name}.{method}").remote(number))

        if method not in self._gathering:
            self._gathering[method] = CallBatcher(send, late)
        return self._gathering[method]

    async def ping(self) -> None:
        await self._result(self.actor.ping.remote())

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        drain: TelemetryBatch = await self._result(self.actor.drain.remote(keep_recording))
        return drain

    async def wait_dead(self) -> NoReturn:
        await self._result(self.actor.linger.remote())
        raise ActorDied(f"{self.name} ended")

    def kill(self, *, hung: bool = False) -> None:
        ray.kill(self.actor)
        if self._process is not None:
            with suppress(ProcessLookupError):
                if hung:  # Ray asks a process to end itself
                    signal.pidfd_send_signal(self._process, signal.SIGKILL)
            os.close(self._process)
            self._process = None

    def _copy_of(self, method: str) -> LatestCopy:
        """On this node; arrays in it are mapped, not read.

        It makes the payload's reference good for as long as it is held, whatever becomes of the node.
        """

        def failed(error: BaseException) -> None:
            log.warning("%s.%s has no copy here: %s", self.name, method, error)

        return self._copies.setdefault(method, LatestCopy(failed))

    async def _result(self, reference: ray.ObjectRef) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise _lost(self.name, error.cause) from error
            raise error.cause from error
        except RayActorError as error:
            raise ActorDied(f"{self.name} died: {_first_line(error)}") from error
        except ObjectLostError as error:
            raise _lost(self.name, error) from error


def _lost(name: str, error: ObjectLostError) -> PayloadLost:
    what_happened, *_how_to_debug_it = _first_line(error).split(". ")
    return PayloadLost(f"{name}: {what_happened}")


def _first_line(error: RayError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _hoist_all(arguments: Arguments, payloads: list[ray.ObjectRef]) -> Arguments:
    args, kwargs = arguments
    return tuple(_hoist(arg, payloads) for arg in args), {name: _hoist(arg, payloads) for name, arg in kwargs.items()}


def _hoist(arg: Any, payloads: list[ray.ObjectRef]) -> Any:
    """Replace references in an argument, or in its items or fields, by slots; collect them in `payloads`."""
    if isinstance(arg, ray.ObjectRef):
        payloads.append(arg)
        return _Slot(len(payloads) - 1)
    if type(arg) is tuple:
        return tuple(_hoist(each, payloads) for each in arg)
    if dataclasses.is_dataclass(arg) and not isinstance(arg, type):
        references = {name: _hoist(v, payloads) for name, v in vars(arg).items() if isinstance(v, ray.ObjectRef)}
        return dataclasses.replace(arg, **references) if references else arg
    return arg


def _fill(arg: Any, payloads: tuple[Any, ...]) -> Any:
    """The inverse of `_hoist`, once Ray has brought the values."""
    if isinstance(arg, _Slot):
        return payloads[arg.index]
    if type(arg) is tuple:
        return tuple(_fill(each, payloads) for each in arg)
    if dataclasses.is_dataclass(arg) and not isinstance(arg, type):
        values = {name: payloads[v.index] for name, v in vars(arg).items() if isinstance(v, _Slot)}
        return dataclasses.replace(arg, **values) if values else arg
    return arg
