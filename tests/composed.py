"""Configs as users compose them."""

import pytest

from grpo.config.composition import compose
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError
from grpo.learner.objective import Objective


def composed(*overrides) -> RunConfig:
    """Compose the config of train.py with these arguments; raise ConfigError as the script would print it."""
    return compose(*overrides)


def checked(*overrides) -> RunConfig:
    """Compose, and look up the loss by name, as happens before anything starts."""
    config = composed(*overrides)
    Objective(config.loss, config.correction)
    return config


def assert_refused(overrides: str, message: str) -> None:
    """Assert that composing raises a ConfigError of one line that matches `message`."""
    with pytest.raises(ConfigError, match=message) as caught:
        composed(*overrides.split())
    assert "\n" not in str(caught.value)
