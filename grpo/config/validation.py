"""Check plain values against a dataclass of settings, and describe what is wrong in one line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from grpo.config.fields import Form, Hint
from grpo.errors import ConfigError

T = TypeVar("T")

_KINDS = {
    "int": "an integer", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "dict": "a mapping like {name: value}", "dataclass": "a group of settings", "none": "null",
}  # fmt: skip
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def build(cls: type[T], values: Mapping[str, Any], *, key: str = "") -> T:
    """Make an instance of the dataclass `cls` from nested plain `values`.

    Raises ConfigError in one line that names the dotted key (below `key`), the value and the fix.
    """
    try:
        built = _adapter(typing.cast(Any, cls)).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(cls, error.errors(include_url=False), key)) from None
    _refuse_bool_as_number(built, values, key)
    return typing.cast(T, built)


def unknown_key(cls: type, dotted: str) -> str:
    """Say that `cls` has no such setting, and suggest one: spelled alike, or of the same name in another group."""
    group, prefix, name = cls, "", dotted
    while "." in name and dataclasses.is_dataclass(owned := typing.get_type_hints(group).get(name.partition(".")[0])):
        prefix, name = f"{prefix}{name.partition('.')[0]}.", name.partition(".")[2]
        group = typing.cast(type, owned)
    names, known = [field.name for field in dataclasses.fields(group)], list(dotted_keys(cls))
    alike = [prefix + match for match in difflib.get_close_matches(name, names, n=1, cutoff=0.75)]
    alike += [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    alike += [prefix + other for other in names if _share_a_word(name, other)]
    return f"no such key; did you mean {alike[0]}?" if alike else f"no such key; it takes {', '.join(names) or 'none'}"


def _share_a_word(name: str, other: str) -> bool:
    return any(difflib.get_close_matches(word, other.split("_"), cutoff=0.75) for word in name.split("_"))


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings of a dataclass, groups included."""
    for name, annotation in typing.get_type_hints(cls).items():
        if name in {field.name for field in dataclasses.fields(cls)}:
            yield prefix + name
            if dataclasses.is_dataclass(annotation):
                yield from dotted_keys(typing.cast(type, annotation), f"{prefix}{name}.")


@lru_cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _explain(cls: type, errors: Sequence[Any], key: str) -> str:
    """Describe the first error; for a setting of several types, everything that it takes."""
    first = errors[0]
    names, annotation = _field_at(cls, first["loc"])
    dotted = ".".join(filter(None, (key, *names)))
    if first["type"] == "missing":
        return f"{dotted}: has no value; set it"
    if first["type"] == "unexpected_keyword_argument":
        fix = unknown_key(cls, ".".join(names))
        return f"{dotted}: {fix.replace('did you mean ', f'did you mean {key}.') if key else fix}"
    same = [error["type"] for error in errors if _field_at(cls, error["loc"])[0] == names]
    metadata = list(_metadata(annotation))
    wanted = " or ".join(dict.fromkeys(_wanted(kind, annotation) for kind in same))
    # The reason for a limit explains nothing to a value of another type.
    limited = any(kind in _BOUNDS or kind in ("predicate_failed", "too_short") for kind in same)
    hints = [item.text for item in metadata if isinstance(item, Hint) and limited]
    return f"{dotted}: is {_shown(first['input'])}, must be {wanted}" + (f": {hints[0]}" if hints else "")


def _wanted(kind: str, annotation: Any) -> str:
    """Complete the sentence "must be ..." for pydantic's kind of error."""
    metadata = list(_metadata(annotation))
    if kind == "literal_error":
        choices = [str(choice) for choice in _choices(annotation)]
        nothing = ["null"] if type(None) in typing.get_args(annotation) else []
        return f"one of {', '.join(nothing + choices)}" if len(nothing + choices) > 1 else choices[0]
    if kind == "predicate_failed":
        return next(item.words for item in metadata if isinstance(item, Form))
    if kind == "too_short":
        return "non-empty"
    if kind in _BOUNDS:
        return _interval(metadata)
    return _KINDS.get(kind.partition("_")[0], f"a {kind}")


def _interval(metadata: Sequence[Any]) -> str:
    """Write the bounds as mathematics does, a square bracket including its end, or in words if there is only one."""
    low = next((item for item in metadata if isinstance(item, (Ge, Gt))), None)
    high = next((item for item in metadata if isinstance(item, (Le, Lt))), None)
    if low and high:
        left = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
        return f"in {left}, " + (f"{high.le}]" if isinstance(high, Le) else f"{high.lt})")
    if low:
        return f"at least {low.ge}" if isinstance(low, Ge) else f"greater than {low.gt}"
    assert high is not None
    return f"at most {high.le}" if isinstance(high, Le) else f"less than {high.lt}"


def _field_at(cls: type, location: Sequence[Any]) -> tuple[tuple[str, ...], Any]:
    """Return the names that lead to a value, without pydantic's names of types, and the last one's annotation."""
    names: list[str] = []
    annotation: Any = cls
    for part in location:
        if dataclasses.is_dataclass(annotation):
            names.append(str(part))
            annotation = typing.get_type_hints(annotation, include_extras=True).get(str(part))
        elif typing.get_origin(bare := _bare(annotation)) is dict:
            names.append(str(part))
            annotation = typing.get_args(bare)[1]
    return tuple(names), annotation


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield the constraints and hints of an annotation and of the members of a union."""
    if typing.get_origin(annotation) is Annotated:
        bare, *metadata = typing.get_args(annotation)
        yield from metadata
        yield from _metadata(bare)
    elif typing.get_origin(annotation) in (Union, UnionType):
        for member in typing.get_args(annotation):
            yield from _metadata(member)


def _choices(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    else:
        for member in typing.get_args(annotation):
            yield from _choices(member)


def _refuse_bool_as_number(built: Any, values: Mapping[str, Any], key: str) -> None:
    """Raise ConfigError for true or false where a number is wanted: pydantic takes them for 1 and 0."""
    for name, value in values.items():
        dotted = ".".join(filter(None, (key, str(name))))
        got = built.get(name, value) if isinstance(built, dict) else getattr(built, str(name))
        if isinstance(value, Mapping):
            _refuse_bool_as_number(got, value, dotted)
        elif isinstance(value, bool) and not isinstance(got, bool):
            raise ConfigError(f"is {_shown(value)}, must be a number", key=dotted)


def _shown(value: Any) -> str:
    """Write a value as YAML does."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
