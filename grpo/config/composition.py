"""Compose settings with Hydra, check them, and turn Hydra's errors into one line.

Hydra and OmegaConf merge plain values here; types and limits are checked afterwards, by pydantic (validation.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from grpo.config.combinations import check_combinations
from grpo.config.renamed import RENAMED, RENAMED_OPTIONS, rewrite_overrides, upgrade
from grpo.config.schema import RunConfig
from grpo.config.validation import build, unknown_key
from grpo.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def compose(*overrides: str, warn: Callable[[str], None] | None = None) -> RunConfig:
    """Return the settings of `train.py` with these arguments.

    `warn` gets a line for every setting under an old name; without it, the line is a FutureWarning. Raises ConfigError
    in one line for everything that the script refuses.

    Example:
        config = compose("+experiment=smollm2", "trainer.max_steps=10")
    """
    words, renamed = rewrite_overrides(overrides)
    _warn_each(renamed, warn)
    register()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose("config", words)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    return from_hydra(composed, words, warn=warn)


def register() -> None:
    """Register the defaults with Hydra as `base`, and config group options under their old names."""
    store = ConfigStore.instance()
    store.store(name="base", node=asdict(RunConfig()))
    for group, name in RENAMED_OPTIONS:
        # The option sets the old key, so that `upgrade` warns also where a YAML file selects it.
        store.store(group=group, name=name, node={name: True})


def from_hydra(
    composed: DictConfig, overrides: Sequence[str] = (), *, warn: Callable[[str], None] | None = None
) -> RunConfig:
    """Return the settings that Hydra composed from its files and these `overrides`, checked.

    `warn` is that of `compose`. Raises ConfigError in one line for a value that is missing, unknown or out of range.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    values, renamed = upgrade(cast(dict[str, Any], values), given)
    _warn_each(renamed, warn)
    return validate(values)


def from_run(folder: Path, overrides: Sequence[str] = (), *, warn: Callable[[str], None] | None = None) -> RunConfig:
    """Return the settings of an earlier run with some values changed (`key=value`).

    `warn` is that of `compose`; it gets one line for all old names in the run's file. Raises ConfigError, also if the
    folder is not a run's.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    words, renamed = rewrite_overrides(overrides)
    try:
        # Old names in the file go before the merge, so that overrides replace their values.
        before, old = upgrade(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file))))
        composed = OmegaConf.merge(asdict(RunConfig()), before, OmegaConf.from_dotlist(words))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    in_file = [f"{file}: has settings under old names, {len(old)} in all, which the next version does not read"]
    _warn_each(renamed + (in_file if old else []), warn)
    return from_hydra(cast(DictConfig, composed), warn=warn)


def validate(config: RunConfig | Mapping[str, Any]) -> RunConfig:
    """Check types, limits and combinations of settings. Raises ConfigError that names the key and the fix."""
    values = asdict(config) if isinstance(config, RunConfig) else config
    checked = build(RunConfig, values)
    check_combinations(checked)
    return checked


def to_yaml(config: RunConfig) -> str:
    """Return the settings as YAML, which `from_run` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def explain(error: Exception) -> str:
    """Describe what Hydra or OmegaConf refused in one line that names the key and the fix."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return f"{cause.full_key}: {_why_refused(str(cause.full_key))}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: has no value; set it on the command line or in the experiment"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    message = str(cause).partition("Config search path")[0]
    return " ".join(message.replace("\n\t", " ").split())


def _why_refused(key: str) -> str:
    """Say what to type instead of an override of a key that is not in the composed settings."""
    if key in RENAMED:
        return f"renamed to {RENAMED[key]}"
    if (free := _free_form_parent(key)) is not None:
        # The second form is for names with dots in them.
        return f"not set by default; prefix it with `+`, as in +{free}={{{key.removeprefix(f'{free}.')}: ...}}"
    return unknown_key(RunConfig, key)


def _free_form_parent(key: str) -> str | None:
    """Return the setting with names of the user's choice that a key lies below, if there is one."""
    owner: Any = RunConfig()
    names = key.split(".")
    for depth, name in enumerate(names):
        if isinstance(owner, dict):
            return ".".join(names[:depth])
        owner = getattr(owner, name, None) if is_dataclass(owner) else None
    return None


def _warn_each(lines: Iterable[str], warn: Callable[[str], None] | None) -> None:
    for line in lines:
        if warn is None:
            warnings.warn(line, FutureWarning, stacklevel=3)
        else:
            warn(line)
