"""From what Hydra composes to the typed config, and from Hydra's errors to one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from grpo.config.combinations import validate
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def register() -> None:
    """Make the dataclasses known to Hydra as `base`, so that composed configs are typed and unknown keys refused."""
    ConfigStore.instance().store(name="base", node=RunConfig)


def to_yaml(config: RunConfig) -> str:
    """The config as it stands, in the form that Hydra reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_hydra(composed: DictConfig) -> RunConfig:
    """The typed config of a composed one. Raises ConfigError for a value that is missing, unknown, or out of range."""
    try:
        config = OmegaConf.to_object(composed)
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    for key in _keys(values):
        if not _declared(key):  # Hydra's `+key=value` gets past the types
            raise ConfigError(_unknown(key))
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def from_overrides(overrides: Sequence[str]) -> RunConfig:
    """That of `train.py` with these arguments. Raises ConfigError for what the script would refuse."""
    register()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return from_hydra(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None


def from_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """That of a run that was, with some values changed (`key=value`). Raises ConfigError, also where there is none."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no config.yaml")
    try:
        composed = OmegaConf.merge(
            OmegaConf.structured(RunConfig), OmegaConf.load(file), OmegaConf.from_dotlist(list(overrides))
        )
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    assert isinstance(composed, DictConfig)
    return from_hydra(composed)


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf refused, as one line that names the key and, where one looks alike, the key meant."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return _unknown(str(cause.full_key))
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: has no value; set it on the command line or in the experiment"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    message = str(cause).partition("Config search path")[0]
    return " ".join(message.replace("\n\t", " ").split())


def _unknown(key: str) -> str:
    if _declared(key):
        free = _free_form(key)
        return f"{key}: is not there yet; add it with a plus sign, +{free}={{{key.removeprefix(f'{free}.')}: ...}}"
    known = [name for name in _keys(OmegaConf.to_container(OmegaConf.structured(RunConfig))) if name]
    alike = difflib.get_close_matches(key, [*known, *(f.name for f in fields(RunConfig))], n=1)
    return f"{key}: no such key; " + (f"did you mean {alike[0]}?" if alike else "grpo/config/schema.py lists them all")


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested dictionaries, down to the leaves."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _declared(key: str) -> bool:
    """Whether a dotted key is a field of the dataclasses, or lies below a free-form one."""
    owner: Any = RunConfig()
    for name in key.split("."):
        if not is_dataclass(owner):
            return isinstance(owner, dict)
        if name not in {f.name for f in fields(owner)}:
            return False
        owner = getattr(owner, name)
    return True


def _free_form(key: str) -> str:
    """The field that a declared key lies below, if only it is free-form: names in there may have dots."""
    owner: Any = RunConfig()
    names = key.split(".")
    for depth, name in enumerate(names):
        if not is_dataclass(owner):
            return ".".join(names[:depth])
        owner = getattr(owner, name)
    return key
