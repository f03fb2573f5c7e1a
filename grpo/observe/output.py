"""Keeps the terminal for progress: Ray's, the actors' and the libraries' own chatter goes into a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


@contextmanager
def chatter_to(path: Path) -> Iterator[Console]:
    """Send everything written to stdout and stderr into `path`; yields a console on the real stdout.

    It is done on file descriptors, because much of the chatter comes from native code and child processes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    with path.open("ab", buffering=0) as file, os.fdopen(os.dup(stdout), "w", encoding="utf-8") as screen:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=screen)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
