"""Job control: use the terminal while the process is in its foreground, and leave it alone in the background.

A shell gives its terminal to one process group at a time. A background process that reads the terminal or
changes its mode is stopped (SIGTTIN, SIGTTOU), unless it ignores these signals, as this one does. Ctrl-Z stops the
process in any case, so the mode of the terminal is restored before.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple, Protocol

_POLL_S = 1.0


class Viewer(Protocol):
    """A view that is shown, hidden and given keys. Calls of `show` and `hide` alternate."""

    def show(self) -> None: ...

    def hide(self) -> None: ...

    def press(self, key: str) -> None: ...


class Terminal(NamedTuple):
    """File descriptors of a screen and, where stdin is a terminal, of its keyboard."""

    screen: int
    keyboard: int | None


def terminal_behind(screen: IO[str], keyboard: IO[str] | None) -> Terminal | None:
    """Return the terminal of two streams; None when the screen is a file, a pipe or a buffer."""
    screen_fd, keyboard_fd = _terminal_fd(screen), _terminal_fd(keyboard)
    return None if screen_fd is None else Terminal(screen_fd, keyboard_fd)


@contextmanager
def foreground_terminal(viewer: Viewer, terminal: Terminal) -> Iterator[None]:
    """Show the viewer and pass it keys while this process is in the foreground; restore the terminal at the end.

    Needs a running event loop, in the main thread.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTTIN, signal.SIGTTOU)}
    session = _TerminalSession(viewer, terminal, loop)
    loop.add_signal_handler(signal.SIGTSTP, session.suspend)
    loop.add_signal_handler(signal.SIGCONT, session.attach)
    try:
        session.attach()
        session.poll()
        yield
    finally:
        session.end()
        loop.remove_signal_handler(signal.SIGTSTP)
        loop.remove_signal_handler(signal.SIGCONT)
        for number, handler in before.items():
            signal.signal(number, handler)


class _TerminalSession:
    def __init__(self, viewer: Viewer, terminal: Terminal, loop: asyncio.AbstractEventLoop) -> None:
        self._viewer, self._loop = viewer, loop
        self._screen, self._keyboard = terminal
        self._shown = False
        self._mode: list[Any] | None = None  # the keyboard's original mode, while it is changed
        self._next_poll: asyncio.TimerHandle | None = None

    def attach(self) -> None:
        """Show the viewer and read keys if this process is in the foreground, else detach."""
        if not _in_foreground(self._screen):
            self.detach()
            return
        if not self._shown:
            self._shown = True
            self._viewer.show()
        if self._keyboard is not None and _in_foreground(self._keyboard):
            if self._mode is None:
                self._mode = termios.tcgetattr(self._keyboard)
            # Every time: a shell may have set its own mode while the process was stopped.
            termios.tcsetattr(self._keyboard, termios.TCSANOW, _key_by_key(self._mode))
            self._loop.add_reader(self._keyboard, self._read)

    def detach(self) -> None:
        """Hide the viewer and restore the keyboard's mode; in the background the mode is the shell's. Idempotent."""
        if self._shown:
            self._shown = False
            self._viewer.hide()
        if self._keyboard is not None and self._mode is not None:
            self._loop.remove_reader(self._keyboard)
            mode, self._mode = self._mode, None
            if _in_foreground(self._keyboard):
                with suppress(termios.error):  # the terminal is gone
                    termios.tcsetattr(self._keyboard, termios.TCSANOW, mode)

    def poll(self) -> None:
        """Check once a second: no signal says that a shell has moved a running process to the foreground."""
        if _in_foreground(self._screen) != self._shown:
            self.attach()
        self._next_poll = self._loop.call_later(_POLL_S, self.poll)

    def end(self) -> None:
        if self._next_poll is not None:
            self._next_poll.cancel()
        self.detach()

    def suspend(self) -> None:
        """Stop the process, on Ctrl-Z. Returns when the process is continued."""
        self.detach()
        self._loop.remove_signal_handler(signal.SIGTSTP)
        signal.raise_signal(signal.SIGTSTP)  # stops this thread right here, until SIGCONT
        self._loop.add_signal_handler(signal.SIGTSTP, self.suspend)
        self.attach()

    def _read(self) -> None:
        """Pass on keys, without waiting. Without any, the terminal is lost: stop reading until SIGCONT."""
        assert self._keyboard is not None
        try:
            keys = os.read(self._keyboard, 64)
        except OSError:  # in the background, or the terminal is gone
            keys = b""
        if not keys:
            self._loop.remove_reader(self._keyboard)
        for key in keys.decode(errors="replace"):
            self._viewer.press(key)


def _key_by_key(mode: list[Any]) -> list[Any]:
    """Return the mode without line buffering and echo, in which a read returns at once, even with nothing."""
    mode = [*mode[:6], [*mode[6]]]
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 0, 0
    return mode


def _in_foreground(descriptor: int) -> bool:
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # a terminal without job control
        return True


def _terminal_fd(stream: IO[str] | None) -> int | None:
    if stream is None or stream.closed:
        return None
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return None
    return descriptor if os.isatty(descriptor) else None
