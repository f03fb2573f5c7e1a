"""Import of user code by `module:name` or `module.name`, the two forms in which configs name it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from grpo.errors import ConfigError


def import_target(target: str, *, key: str) -> Callable[..., Any]:
    """Import the class or function `module:name` or `module.name`. Raises ConfigError for `key` if that fails."""
    module_name, _, name = target.replace(":", ".").rpartition(".")
    if not module_name:
        raise ConfigError(f"{target!r} is neither a known name nor of the form module:name", key=key)
    try:
        imported = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"can't import {target!r}: {error}", key=key) from error
    if not callable(imported):
        raise ConfigError(f"{target!r} is not callable", key=key)
    return imported


def named_function(name: str, known: Mapping[str, Callable[..., Any] | str], *, key: str) -> Callable[..., Any]:
    """Return the function that `known` lists under `name`, else import `name`. Raises ConfigError for `key`.

    Values of `known` are functions, or import targets that are imported on demand.
    """
    if name in known:
        function = known[name]
        return import_target(function, key=key) if isinstance(function, str) else function
    if ":" not in name and "." not in name:
        raise ConfigError(f"{name!r} is not one of {', '.join(known)}, nor of the form module:function", key=key)
    return import_target(name, key=key)


def check_arguments(target: Callable[..., Any], args: Mapping[str, Any], *, key: str, fix: str = "") -> None:
    """Raise ConfigError for `key`, which ends with the `fix`, if `target` does not accept these keyword arguments."""
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
    if unknown := sorted(set(args) - set(names)):
        message = f"{unknown[0]!r} is not one of {', '.join(names) or '(none)'}"
        raise ConfigError("; ".join(filter(None, [message, fix])), key=key)
