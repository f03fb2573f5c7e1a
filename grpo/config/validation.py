"""Check plain values against a dataclass of settings, and turn what pydantic finds into one line."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from grpo.config.fields import Hint
from grpo.errors import ConfigError

T = TypeVar("T")

_KINDS = {
    "int": "an integer", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "dict": "a mapping like {name: value}", "dataclass": "a group of settings", "finite": "a finite number",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def build(cls: type[T], values: Mapping[str, Any], *, key: str = "") -> T:
    """Make an instance of the dataclass `cls` from nested plain `values`.

    Raises ConfigError in one line that names the dotted key (below `key`), the value and the fix.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(cls, error.errors(include_url=False), key)) from None


def _explain(cls: Any, errors: Sequence[Any], key: str) -> str:
    """Describe the first error; where a field takes one of several types, all that it takes."""
    first = errors[0]
    names, field = _path(cls, first["loc"])
    dotted = ".".join(filter(None, (key, *names)))
    if first["type"] in ("unexpected_keyword_argument", "missing"):
        return f"{dotted}: {_unknown(cls, names) if first['type'] != 'missing' else 'has no value; set it'}"
    same = [error for error in errors if _path(cls, error["loc"])[0] == names]
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in same))
    hints = [item.text for item in typing.get_args(field)[1:] if isinstance(item, Hint)]
    return f"{dotted}: is {first['input']!r}, must be {wanted}" + (f": {hints[0]}" if hints else "")


def _wanted(error: Any) -> str:
    kind = error["type"]
    if kind == "literal_error":
        return f"one of {error['ctx']['expected']}".replace("'", "")
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{words} {error['ctx'][bound]:g}"
    return _KINDS.get(kind.partition("_")[0], error["msg"])


def _path(cls: Any, location: Sequence[Any]) -> tuple[tuple[str, ...], Any]:
    """Names of the fields that lead to a value, without pydantic's names of types, and the last one's annotation."""
    names: list[str] = []
    annotation: Any = cls
    for part in location:
        if dataclasses.is_dataclass(annotation):
            names.append(str(part))
            annotation = typing.get_type_hints(annotation, include_extras=True).get(str(part))
        elif names and typing.get_origin(_bare(annotation)) is dict and "[" not in str(part):
            names.append(str(part))
            break
    return tuple(names), annotation


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _unknown(cls: Any, names: Sequence[str]) -> str:
    """Say that there is no such key, and which one may be meant."""
    owner = cls
    for name in names[:-1]:
        owner = typing.get_type_hints(owner)[name]
    known = [field.name for field in dataclasses.fields(owner)]
    alike = difflib.get_close_matches(names[-1], known, n=1)
    prefix = "".join(f"{name}." for name in names[:-1])
    fix = f"did you mean {prefix}{alike[0]}?" if alike else f"it takes {', '.join(known) or 'none'}"
    return f"no such key; {fix}"
