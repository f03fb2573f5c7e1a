"""Method calls to a Ray actor: payloads by reference, errors with their own type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from grpo.types import ActorDied


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands in an argument for a reference that travels beside it, at the top level, where Ray resolves it."""

    index: int


def host_class(cls: type) -> type:
    """The process that hosts one instance of `cls`, under the same name in Ray's dashboard."""
    return type(cls.__name__, (_Host,), {})


class _Host:
    def __init__(self, factory: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self._actor = factory(**kwargs)

    async def invoke(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *payloads: Any) -> Any:
        args = tuple(_fill(arg, payloads) for arg in args)
        kwargs = {name: _fill(arg, payloads) for name, arg in kwargs.items()}
        return await getattr(self._actor, method)(*args, **kwargs)


class RayEndpoint:
    """A Ray actor that hosts an instance of `cls`."""

    def __init__(self, name: str, cls: type, actor: Any) -> None:
        self.name, self.actor = name, actor
        self._cls = cls

    async def invoke(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        payloads: list[ray.ObjectRef] = []
        args = tuple(_hoist(arg, payloads) for arg in args)
        kwargs = {name: _hoist(arg, payloads) for name, arg in kwargs.items()}
        returns_payload = getattr(getattr(self._cls, method, None), "returns_payload", False)
        remote = self.actor.invoke.options(num_returns=2 if returns_payload else 1, name=f"{self.name}.{method}")
        try:
            if returns_payload:
                payload, report = remote.remote(method, args, kwargs, *payloads)
                return payload, await report
            return await remote.remote(method, args, kwargs, *payloads)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise ActorDied(f"{self.name} died: {str(error).splitlines()[0]}") from error


def _hoist(arg: Any, payloads: list[ray.ObjectRef]) -> Any:
    """Replace references in an argument, or in the fields of a dataclass, by slots; collect them in `payloads`."""
    if isinstance(arg, ray.ObjectRef):
        payloads.append(arg)
        return _Slot(len(payloads) - 1)
    if dataclasses.is_dataclass(arg) and not isinstance(arg, type):
        fields = {field.name: getattr(arg, field.name) for field in dataclasses.fields(arg)}
        references = {name: _hoist(v, payloads) for name, v in fields.items() if isinstance(v, ray.ObjectRef)}
        return dataclasses.replace(arg, **references) if references else arg
    return arg


def _fill(arg: Any, payloads: tuple[Any, ...]) -> Any:
    """The inverse of `_hoist`, once Ray has brought the values."""
    if isinstance(arg, _Slot):
        return payloads[arg.index]
    if dataclasses.is_dataclass(arg) and not isinstance(arg, type):
        fields = {field.name: getattr(arg, field.name) for field in dataclasses.fields(arg)}
        values = {name: payloads[v.index] for name, v in fields.items() if isinstance(v, _Slot)}
        return dataclasses.replace(arg, **values) if values else arg
    return arg
