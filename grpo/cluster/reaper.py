"""Ends what is left of a Ray session once its driver is gone. Also a script, for it has to outlive the driver.

Ray ties its servers to the driver, but a raylet's agents wait for a minute for somebody to report its death to, and a
start that is broken off leaves whatever it had started by then.
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

_PATIENCE_S = 10.0  # with a process that the kernel takes its time to end
_LOG_OF_SESSION = re.compile(r"/(session_[^/]+)_(\d+)/logs/")  # when it was started, and by whom


@contextmanager
def session_reaper() -> Iterator[None]:
    """At the end of the block, or when this process is killed in it, end the Ray session that it started there."""
    begun = datetime.now().strftime("session_%Y-%m-%d_%H-%M-%S_%f")
    reaper = subprocess.Popen(
        [sys.executable, "-I", __file__, begun, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # out of the reach of Ctrl-C
    )
    try:
        yield
    finally:
        reaper.communicate()


def _processes(begun: str, driver: str) -> set[int]:
    """All others that write to a log of a session of this driver, begun no earlier: a process id comes again."""
    found = set()
    for file in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # it has just been closed
            session = _LOG_OF_SESSION.search(os.readlink(file))
            writes = os.lstat(file).st_mode & stat.S_IWUSR  # who only reads along stays
            if writes and session and session[1] >= begun and session[2] == driver:
                found.add(int(file.split("/")[2]))
    return found - {int(driver)}  # which goes on after the block


def _reap(begun: str, driver: str) -> None:
    sys.stdin.read()  # the driver writes nothing; its end, however it comes, closes the pipe
    give_up = time.monotonic() + _PATIENCE_S
    while (left := _processes(begun, driver)) and time.monotonic() < give_up:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    _reap(*sys.argv[1:])
