"""What the tests of the scripts do with the processes that they start."""

import os
import time
from pathlib import Path


def finish(process, timeout=600):
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def only_run(tmp_path):
    (folder,) = tmp_path.glob("outputs/*/*")
    return folder


def processes_of(session):
    """Command lines of living processes of a session that a test started; Ray gets a moment to end its helpers."""
    deadline = time.monotonic() + 60
    while True:
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    stat = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                    if int(stat[3]) == session and stat[0] != "Z":
                        found.append(Path(entry.path, "cmdline").read_text())
                except (FileNotFoundError, ProcessLookupError):
                    continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
