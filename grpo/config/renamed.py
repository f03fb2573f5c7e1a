"""Short and old forms of settings: parameters of the loss without `args`, and old names.

Old names work in this version, with a warning; the next version refuses them. Overrides are rewritten before Hydra sees
them (`rewrite_overrides`), and values of YAML files after composition (`upgrade`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from grpo.config.algorithm import LossConfig
from grpo.errors import ConfigError

RENAMED = {
    "buffer.window": "buffer.reorder_window",
    "cluster.nodes_timeout_s": "cluster.wait_for_nodes_s",
    "correction.high": "correction.max_ratio",
    "correction.low": "correction.min_ratio",
    "correction.weights": "correction.mode",
    "dataloader.revisit": "dataloader.revisit_fraction",
    "eval.solved_at": "eval.success_threshold",
    "filter.max_batches": "filter.max_dropped_batches",
    "filter.zero_advantage": "filter.zero_variance",
    "loss.kl": "loss.kl_estimator",
    "model.pickled_weights": "model.allow_pickle",
    "model.prepare": "model.builder",
    "recovery.health_every_s": "recovery.health_interval_s",
    "recovery.max_data_failures": "recovery.max_dropped_groups",
    "rollout.target_wait": "rollout.target_trainer_idle",
    "shaping.overlong_zone": "shaping.overlong_buffer",
    "weights.backend": "weight_sync.backend",
    "weights.bucket_mb": "weight_sync.bucket_mb",
    "weights.timeout_s": "weight_sync.timeout_s",
    "weights.transport": "weight_sync.transport",
}
RENAMED_OPTIONS = {("filter", "zero_advantage"): "zero_variance"}

_LOSS_SETTINGS = {field.name for field in fields(LossConfig)}
_OVERRIDE = re.compile(r"(?P<sign>\+{0,2}|~)(?P<key>[\w.]+)(?P<value>=.*|)", re.DOTALL)


def rewrite_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line in today's form, and a warning for each old name.

    A word is `key=value`, with or without `+`, `++` or `~`, and with the values of a sweep. Old names become new ones.
    A parameter of the loss, like `loss.clip_low=0.1`, gets `++`, so that Hydra takes it whether or not the file of the
    loss sets it. All other words, like the flags of Hydra, stay unchanged. Raises ConfigError where a setting is given
    under both names.

    Example:
        words, warnings = rewrite_overrides(["buffer.window=1,2", "loss.clip_low=0.1", "--multirun"])
        words     # ["buffer.reorder_window=1,2", "++loss.clip_low=0.1", "--multirun"]
        warnings  # ["buffer.window: renamed to buffer.reorder_window; the old name goes in the next version"]
    """
    rewritten, warnings = list(words), []
    given = {match["key"] for word in rewritten if (match := _OVERRIDE.fullmatch(word))}
    for i, word in enumerate(rewritten):
        if (match := _OVERRIDE.fullmatch(word)) is None:
            continue
        sign, key, value = match["sign"], match["key"], match["value"]
        if (new := RENAMED.get(key)) is not None:
            if new in given:
                raise ConfigError(f"renamed to {new}, which is given too; leave {key} out", key=key)
            warnings.append(renamed_line(key, new))
            key = new
        for (group, old), option in RENAMED_OPTIONS.items():
            if key == group and re.search(rf"\b{old}\b", value):
                warnings.append(renamed_line(f"{group}={old}", f"{group}={option}"))
                value = re.sub(rf"\b{old}\b", option, value)
        group, _, name = key.partition(".")
        if group == "loss" and name.isidentifier() and name not in _LOSS_SETTINGS and sign != "~":
            sign = "++"
        rewritten[i] = f"{sign}{key}{value}"
    return rewritten, warnings


def upgrade(values: Mapping[str, Any], given: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Return nested values in today's form, and a warning for each old name.

    A value under an old name replaces a default, or a config group's value, under the new one. It yields to a value
    from the command line, whose dotted key is in `given`. Keys of `loss` that are not fields of LossConfig are
    parameters of the loss: they move into `loss.args`, where null means the loss's default and is left out. Raises
    ConfigError for a parameter in both places.
    """
    upgraded, renamed = _rename(values, given)
    if isinstance(loss := upgraded.get("loss"), dict):
        parameters = {name: value for name, value in loss.items() if name not in _LOSS_SETTINGS}
        for name in parameters:
            if f"loss.args.{name}" in given:
                raise ConfigError(f"give it as loss.{name}, without args", key=f"loss.args.{name}")
        args = {**(loss.get("args") or {}), **parameters}
        upgraded["loss"] = {name: value for name, value in loss.items() if name in _LOSS_SETTINGS} | {
            "args": {name: value for name, value in args.items() if value is not None}
        }
    return upgraded, renamed


def _rename(values: Mapping[str, Any], given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Rename keys of nested values and return a warning for each; see `upgrade`."""
    renamed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    warnings = []
    for old, new in RENAMED.items():
        (group, name), (new_group, new_name) = old.split("."), new.split(".")
        if not isinstance(settings := renamed.get(group), dict) or name not in settings:
            continue
        value = settings.pop(name)
        if new not in given:
            renamed.setdefault(new_group, {})[new_name] = value
        if not settings:
            del renamed[group]
        warnings.append(renamed_line(old, new))
    return renamed, warnings


def renamed_line(old: str, new: str) -> str:
    """Return the warning for one old name."""
    return f"{old}: renamed to {new}; the old name goes in the next version"
