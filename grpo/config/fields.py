"""Building blocks of settings: the base class of config groups, and the reason behind a limit.

A limit stands in the annotation of its field, as a constraint of `annotated_types` that pydantic checks:

    @dataclass
    class RolloutConfig(Settings):
        group_size: Annotated[int, Ge(2), Hint("advantages compare the completions of one prompt")] = 8
        \"\"\"Completions per prompt (G).\"\"\"

Importing this costs nothing: pydantic itself is imported where a config is checked, see validation.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


class Settings:
    """Base class of the dataclasses that hold settings: unknown names are refused, numbers become text where needed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "coerce_numbers_to_str": True}


@dataclass(frozen=True)
class Hint:
    """Reason for a limit, or the fix: the end of the error message."""

    text: str
