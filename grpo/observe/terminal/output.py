"""Keep the terminal for progress: send the output of Ray, the actors and the libraries into a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


class PipeSafeConsole(Console):
    """A console that falls silent when its reader closes the pipe: `| head` must not end a training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.file.fileno())
        os.close(null)


@contextmanager
def redirect_output(path: Path) -> Iterator[PipeSafeConsole]:
    """Send everything written to stdout and stderr into `path`; yield a console on the real stdout.

    It redirects file descriptors, because much of the output comes from native code and child processes.
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
            # Restore both descriptors, after what Python still buffers has gone into the file.
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
