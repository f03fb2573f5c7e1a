"""Old names of renamed metrics: written beside the new ones in this version, and understood in runs of earlier ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RENAMED_METRICS = {  # old name -> new name
    "mismatch/behavior_abs": "mismatch/logprob_abs_diff",
    "mismatch/same_version_abs": "mismatch/logprob_abs_diff_same_version",
    "mismatch/behavior_k1": "mismatch/kl_k1",
    "mismatch/behavior_k3": "mismatch/kl_k3",
    "mismatch/correction_held_fraction": "mismatch/is_clip_fraction",  # by age only
    "trainer/correction_held_fraction": "trainer/is_clip_fraction",
    "time/weights_live_s": "time/weight_load_s",
    "generator/rows": "generator/batch_size",
    "rollout/outstanding": "rollout/tickets_in_use",
    "rollout/zero_advantage_dropped": "rollout/zero_variance_dropped",
    "recovery/groups_begun_again": "recovery/groups_requeued",
    "groups_begun_again": "groups_requeued",  # of summary.json
}
RENAMED_NOTICE = "these metrics have new names; the old ones go in the next version: " + ", ".join(
    f"{old} -> {new}" for old, new in RENAMED_METRICS.items()
)
_OLD_NAMES = {new: old for old, new in RENAMED_METRICS.items()}
_AGE = re.compile(r"(?<=^mismatch/)age_\d+/")


def with_old_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add every renamed value of a metrics line or a summary under its old name too."""
    old_names = {name: _renamed(name, _OLD_NAMES) for name in record}
    return {**record, **{old: record[name] for name, old in old_names.items() if old is not None}}


def with_new_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Move values under old names to the new ones; where a record has both, the old name is dropped."""
    new_names = {name: _renamed(name, RENAMED_METRICS) for name in record}
    renamed = {new: record[name] for name, new in new_names.items() if new is not None}
    return {name: value for name, value in record.items() if new_names[name] is None} | renamed


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Return the other name of a metric, also below `mismatch/age_<n>/` and with a suffix such as `/mean`."""
    age = _AGE.search(name)
    plain = _AGE.sub("", name)
    for prefix, other in names.items():
        if plain == prefix or plain.startswith(f"{prefix}/"):
            renamed = other + plain.removeprefix(prefix)
            return renamed if age is None else renamed.replace("mismatch/", f"mismatch/{age[0]}", 1)
    return None
