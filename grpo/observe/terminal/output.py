"""Keeps the terminal for progress: Ray's, the actors' and the libraries' own chatter goes into a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


class PipeSafeConsole(Console):
    """A console that falls silent when its reader goes away: `| head` must not end a training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


@contextmanager
def redirect_output(path: Path) -> Iterator[PipeSafeConsole]:
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
            yield PipeSafeConsole(file=screen)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
