"""From `observe.sinks` to the sinks of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from grpo.cluster.ray_sink import RaySink
from grpo.imports import check_arguments, named_function
from grpo.observe.sinks.base import Sink
from grpo.observe.sinks.fanout import Sinks, Tell
from grpo.observe.sinks.tensorboard_sink import TensorBoardSink
from grpo.observe.sinks.trackio_sink import TrackioSink
from grpo.observe.sinks.wandb_sink import WandbSink
from grpo.types import ConfigError


class Known(NamedTuple):
    """A sink that comes with the project: the package that it needs, and the extra that installs it."""

    sink: Callable[..., Sink]
    package: str
    extra: str


SINKS = {
    "tensorboard": Known(TensorBoardSink, "tensorboard", "tensorboard"),
    "wandb": Known(WandbSink, "wandb", "wandb"),
    "trackio": Known(TrackioSink, "trackio", "trackio"),
    "ray": Known(RaySink, "prometheus_client", "dashboard"),
}

_KEY = "observe.sinks"


def check_sinks(config_sinks: Mapping[str, Any]) -> dict[str, Callable[..., Sink]]:
    """The class of every sink, by name. Imports nothing heavy.

    Raises ConfigError for an unknown name, a package that is not installed, or options that the class doesn't take.
    """
    classes = {}
    for name, options in config_sinks.items():
        found = named_function(str(name), {name: known.sink for name, known in SINKS.items()}, key=_KEY)
        if name in SINKS and importlib.util.find_spec(SINKS[name].package) is None:
            known = SINKS[name]
            raise ConfigError(
                f"{known.package} is not installed: pip install -e '.[{known.extra}]'", key=f"{_KEY}.{name}"
            )
        if not isinstance(options, Mapping):
            raise ConfigError(f"is {options!r}, must be its options, {{}} for none", key=f"{_KEY}.{name}")
        check_arguments(found, options, key=f"{_KEY}.{name}")
        classes[name] = found
    return classes


def make_sinks(
    config_sinks: Mapping[str, Mapping[str, Any]], folder: Path, config: Mapping[str, Any], tell: Tell
) -> Sinks:
    """Start the sinks that are named, for the run in `folder`; raises what `check_sinks` raises.

    They open in threads of their own: one that can't be opened is told and does without, the run goes on.
    """
    classes = check_sinks(config_sinks)
    return Sinks({n: partial(made, folder, config, **config_sinks[n]) for n, made in classes.items()}, tell)
