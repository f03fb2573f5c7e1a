"""The memory of a process and of all that descend from it."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

_EVERY_S = 2.0
_GIB_KB = 2**20


class PeakMemory:
    """Looks every now and then, in a thread, while the context lasts: `peak_gib` is the most that it saw.

    Pages that several processes share count once (proportional set size).
    """

    def __init__(self, pid: int) -> None:
        self.peak_gib = 0.0
        self._pid, self._over = pid, Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_S):
            self.peak_gib = max(self.peak_gib, used_gib(self._pid))


def used_gib(pid: int) -> float:
    """Of the process and its descendants together, at the moment."""
    return sum(_proportional_kb(member) for member in family(pid)) / _GIB_KB


def family(pid: int) -> list[int]:
    """The process, and those that descend from it."""
    children = defaultdict(list)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (status := _read(Path(entry.path, "stat"))):
            children[int(status.rpartition(")")[2].split()[1])].append(int(entry.name))
    found = [pid]
    for member in found:
        found += children[member]
    return found


def _proportional_kb(pid: int) -> int:
    match = re.search(r"^Pss:\s*(\d+) kB", _read(Path(f"/proc/{pid}/smaps_rollup")), re.MULTILINE)
    return int(match.group(1)) if match else 0


def _read(path: Path) -> str:
    """Empty for a process that has ended meanwhile."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
