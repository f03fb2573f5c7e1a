"""Building blocks of settings: the base class of config groups, common limits, and the words of an error.

A limit stands in the annotation of its field, as a constraint of `annotated_types` that pydantic checks. This module
does not import pydantic, so actors can import the schema cheaply; see validation.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Predicate


class Settings:
    """Base class of the dataclasses that hold settings: unknown names are refused, numbers become text where needed.

    Example:
        @dataclass
        class RolloutConfig(Settings):
            group_size: Annotated[int, Ge(2), Hint("advantages compare the completions of one prompt")] = 8
            \"\"\"Completions per prompt (G).\"\"\"

        build(RolloutConfig, {"group_size": 1}, key="rollout")
        # ConfigError: rollout.group_size: is 1, must be at least 2: advantages compare the completions of one prompt
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "coerce_numbers_to_str": True}


@dataclass(frozen=True)
class Hint:
    """Reason for a limit, or the fix: the end of the error message."""

    text: str


@dataclass(frozen=True)
class Form(Predicate):
    """Limit that is a function of the value; `words` complete "must be ..."."""

    words: str


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Gt(0), Le(1)]
FiniteFloat = Annotated[float, Form(math.isfinite, "a finite number")]
