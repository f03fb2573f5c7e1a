"""Where the time from the command to the first trained step goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED_S = time.perf_counter()


class Startup:
    """Stages that end one after another, from the begin of the process on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._before_s = 0.0

    def ended(self, stage: str) -> None:
        """Once for each stage: one that has ended before is passed over."""
        if stage not in self.seconds:
            now_s = process_age_s()
            self.seconds[stage] = now_s - self._before_s
            self._before_s = now_s


def process_age_s() -> float:
    """Seconds since this process began; on systems without /proc, since this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), counted from the boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED_S
