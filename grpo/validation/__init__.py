"""The checks of a config that need nothing heavy: limits, combinations, and warnings of what works unexpectedly."""

from __future__ import annotations

from grpo.config import RunConfig
from grpo.validation.combinations import check_combinations
from grpo.validation.limits import check_limits


def validate(config: RunConfig) -> None:
    """Check ranges, choices and what belongs together. Raises ConfigError naming the key and the fix."""
    check_limits(config)
    check_combinations(config)
