"""The terminal as long as a run has it: in front it is drawn on and gives keys; in the background it is left alone.

A shell hands its terminal to one process group at a time. Whoever reads it or changes its mode from the background is
stopped by the system (SIGTTIN, SIGTTOU), unless those signals are ignored, as they are here. Ctrl-Z stops the process
in any case; what it changed has to be undone before.
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

_LOOK_EVERY_S = 1.0


class Viewer(Protocol):
    """What is drawn. `show` and `hide` take turns."""

    def show(self) -> None: ...

    def hide(self) -> None: ...

    def press(self, key: str) -> None: ...


class Terminal(NamedTuple):
    """Descriptors. Without a keyboard nobody can press a key."""

    screen: int
    keyboard: int | None


def terminal_behind(screen: IO[str], keyboard: IO[str] | None) -> Terminal | None:
    """None when the screen is a file, a pipe or a buffer."""
    shown_on, typed_on = _descriptor(screen), _descriptor(keyboard)
    return None if shown_on is None else Terminal(shown_on, typed_on)


@contextmanager
def foreground_terminal(viewer: Viewer, terminal: Terminal) -> Iterator[None]:
    """Show the viewer, and hand it keys, while this process is in front. However it is left, the terminal is as it was.

    Needs a running event loop, in the main thread.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTTIN, signal.SIGTTOU)}
    hold = _TerminalSession(viewer, terminal, loop)
    loop.add_signal_handler(signal.SIGTSTP, hold.suspend)
    loop.add_signal_handler(signal.SIGCONT, hold.take)
    try:
        hold.take()
        hold.look_again()
        yield
    finally:
        hold.end()
        loop.remove_signal_handler(signal.SIGTSTP)
        loop.remove_signal_handler(signal.SIGCONT)
        for number, handler in before.items():
            signal.signal(number, handler)


class _TerminalSession:
    def __init__(self, viewer: Viewer, terminal: Terminal, loop: asyncio.AbstractEventLoop) -> None:
        self._viewer, self._loop = viewer, loop
        self._screen, self._keyboard = terminal
        self._shown = False
        self._mode: list[Any] | None = None  # of the keyboard, before it was changed
        self._next_look: asyncio.TimerHandle | None = None

    def take(self) -> None:
        """Where this process is in front, have the terminal; else leave it to others."""
        if not _in_front(self._screen):
            self.give_back()
            return
        if not self._shown:
            self._shown = True
            self._viewer.show()
        if self._keyboard is not None and _in_front(self._keyboard):
            if self._mode is None:
                self._mode = termios.tcgetattr(self._keyboard)
            # Again in any case: a shell may have set its own mode while the process was stopped.
            termios.tcsetattr(self._keyboard, termios.TCSANOW, _key_by_key(self._mode))
            self._loop.add_reader(self._keyboard, self._read)

    def give_back(self) -> None:
        """Twice is harmless. From the background nothing is changed: the shell has set its own mode."""
        if self._shown:
            self._shown = False
            self._viewer.hide()
        if self._keyboard is not None and self._mode is not None:
            self._loop.remove_reader(self._keyboard)
            mode, self._mode = self._mode, None
            if _in_front(self._keyboard):
                with suppress(termios.error):  # it was hung up
                    termios.tcsetattr(self._keyboard, termios.TCSANOW, mode)

    def look_again(self) -> None:
        """Once a second: nobody is told when a shell brings a running process to the front."""
        if _in_front(self._screen) != self._shown:
            self.take()
        self._next_look = self._loop.call_later(_LOOK_EVERY_S, self.look_again)

    def end(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        self.give_back()

    def suspend(self) -> None:
        """Somebody pressed Ctrl-Z. Returns when the process goes on."""
        self.give_back()
        self._loop.remove_signal_handler(signal.SIGTSTP)
        signal.raise_signal(signal.SIGTSTP)  # to this thread, which gets no further until somebody continues it
        self._loop.add_signal_handler(signal.SIGTSTP, self.suspend)
        self.take()

    def _read(self) -> None:
        """Never waits. Without anything to read, the terminal is another's or gone: no more until SIGCONT."""
        assert self._keyboard is not None
        try:
            keys = os.read(self._keyboard, 64)
        except OSError:  # from the background, or hung up
            keys = b""
        if not keys:
            self._loop.remove_reader(self._keyboard)
        for key in keys.decode(errors="replace"):
            self._viewer.press(key)


def _key_by_key(mode: list[Any]) -> list[Any]:
    """The mode without waiting for the end of a line, without echo; a read returns what is there, if only nothing."""
    mode = [*mode[:6], [*mode[6]]]
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 0, 0
    return mode


def _in_front(descriptor: int) -> bool:
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # a terminal without job control
        return True


def _descriptor(stream: IO[str] | None) -> int | None:
    """Of a terminal."""
    if stream is None or stream.closed:
        return None
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return None
    return descriptor if os.isatty(descriptor) else None
