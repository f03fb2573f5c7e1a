"""Finding a class or function by its `module:name` or `module.name`, the forms in which configs name user code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from grpo.errors import ConfigError


def import_target(target: str, *, key: str) -> Callable[..., Any]:
    """The object called `module:name` or `module.name`. Raises ConfigError that names `key` when there is none."""
    module_name, _, name = target.replace(":", ".").rpartition(".")
    if not module_name:
        raise ConfigError(f"{target!r} is neither a known name nor of the form module:name", key=key)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"can't import {target!r}: {error}", key=key) from error
    if not callable(found):
        raise ConfigError(f"{target!r} is not callable", key=key)
    return found


def named_function(name: str, known: Mapping[str, Callable[..., Any] | str], *, key: str) -> Callable[..., Any]:
    """One of the known ones, imported if it is named there, or `module:name`. Raises ConfigError when there is none."""
    if name in known:
        found = known[name]
        return import_target(found, key=key) if isinstance(found, str) else found
    if ":" not in name and "." not in name:
        raise ConfigError(f"{name!r} is not one of {', '.join(known)}, nor of the form module:function", key=key)
    return import_target(name, key=key)


def check_arguments(target: Callable[..., Any], args: Mapping[str, Any], *, key: str) -> None:
    """Raise ConfigError when `target` doesn't take these keyword arguments."""
    known = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return
    names = [parameter.name for parameter in known if parameter.kind is not parameter.POSITIONAL_ONLY]
    if unknown := sorted(set(args) - set(names)):
        raise ConfigError(f"{unknown[0]!r} is not one of {', '.join(names) or '(none)'}", key=key)
