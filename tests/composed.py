"""Configs as users compose them."""

import pytest

from grpo.config.composition import from_overrides
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError
from grpo.learner.objective import Objective


def composed(*overrides) -> RunConfig:
    """That of train.py with these arguments; raises ConfigError as the script would print it."""
    return from_overrides(overrides)


def checked(*overrides) -> RunConfig:
    """Composed, and asked for the loss that it names, as it is before anything starts."""
    config = composed(*overrides)
    Objective(config.loss, config.correction)
    return config


def assert_refused(overrides: str, message: str) -> None:
    """In one line, which `message` matches."""
    with pytest.raises(ConfigError, match=message) as caught:
        composed(*overrides.split())
    assert "\n" not in str(caught.value)
