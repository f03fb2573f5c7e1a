"""End the processes of a Ray session once its driver is gone. Also a script, since it has to outlive the driver.

Ray ties its servers to the driver. But the agents of a raylet first try for a minute to report its death, and a start
that is interrupted leaves the processes that it had started.
"""

from __future__ import annotations

import glob
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

_TIMEOUT_S = 10.0  # the kernel may take its time to end a process
_SESSION_LOG = re.compile(r"/(session_[^/]+)_(\d+)/logs/")  # when it was started, and by which process


@contextmanager
def session_reaper() -> Iterator[None]:
    """End the Ray session that this process starts in the block, when the block ends or the process is killed in it."""
    begun = datetime.now().strftime("session_%Y-%m-%d_%H-%M-%S_%f")
    reaper = subprocess.Popen(
        [sys.executable, "-I", __file__, begun, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C does not reach it
    )
    try:
        yield
    finally:
        reaper.communicate()


def _processes(begun: str, driver: str) -> set[int]:
    """Return the other processes that write to a log of a session of this driver.

    Sessions that began earlier are of another process: process ids are reused.
    """
    found = set()
    for file in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # it has just been closed
            session = _SESSION_LOG.search(os.readlink(file))
            writes = os.lstat(file).st_mode & stat.S_IWUSR  # a reader is not a process of the session
            if writes and session and session[1] >= begun and session[2] == driver:
                found.add(int(file.split("/")[2]))
    return found - {int(driver)}  # which may continue after the block


def _reap(begun: str, driver: str) -> None:
    sys.stdin.read()  # the driver writes nothing; its end, however it comes, closes the pipe
    deadline = time.monotonic() + _TIMEOUT_S
    while (left := _processes(begun, driver)) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    _reap(*sys.argv[1:])
