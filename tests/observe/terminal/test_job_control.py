"""Keys and job control, on pseudo-terminals."""

import asyncio
import io
import os
import pty
import select
import shutil
import signal
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from grpo.observe.terminal.job_control import Terminal, foreground_terminal, terminal_behind
from grpo.utils.aio import Signal

ROOT = Path(__file__).parents[3]


class Viewer:
    def __init__(self):
        self.told = []
        self._changed = Signal()

    def show(self):
        self.press("show")

    def hide(self):
        self.press("hide")

    def press(self, key):
        self.told.append(key)
        self._changed.notify()

    async def until_told(self, *told):
        async with asyncio.timeout(60):
            await self._changed.wait_for(lambda: self.told == [*told])


@pytest.fixture
def pseudo():
    """(our end, the terminal): nobody's controlling terminal, so whoever has it is in front."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    for descriptor in (ours, theirs):
        try:
            os.close(descriptor)
        except OSError:  # the test has closed it
            continue


def waits_for_lines(descriptor):
    return bool(termios.tcgetattr(descriptor)[3] & termios.ICANON)


async def test_keys_arrive_without_enter_and_unseen_and_the_terminal_is_as_before(pseudo):
    ours, theirs = pseudo
    before, viewer = termios.tcgetattr(theirs), Viewer()
    with foreground_terminal(viewer, Terminal(theirs, theirs)):
        os.write(ours, b"s")
        await viewer.until_told("show", "s")
        assert termios.tcgetattr(theirs)[3] & termios.ISIG  # Ctrl-C still interrupts
    assert viewer.told == ["show", "s", "hide"]
    assert termios.tcgetattr(theirs) == before
    assert select.select([ours], [], [], 0)[0] == []  # no echo


async def test_an_error_leaves_the_terminal_and_the_signals_as_before_too(pseudo):
    _, theirs = pseudo
    numbers = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP, signal.SIGCONT)
    mode, handlers, viewer = termios.tcgetattr(theirs), list(map(signal.getsignal, numbers)), Viewer()
    with suppress(ValueError), foreground_terminal(viewer, Terminal(theirs, theirs)):
        assert not waits_for_lines(theirs)
        raise ValueError("broken")
    assert viewer.told == ["show", "hide"]
    assert termios.tcgetattr(theirs) == mode
    assert list(map(signal.getsignal, numbers)) == handlers


async def test_a_screen_without_a_keyboard_is_drawn_on_and_left_in_its_mode(pseudo):
    _, theirs = pseudo
    viewer = Viewer()
    with foreground_terminal(viewer, Terminal(theirs, None)):
        assert waits_for_lines(theirs)
    assert viewer.told == ["show", "hide"]


async def test_a_terminal_that_is_gone_is_read_once(pseudo, monkeypatch):
    ours, theirs = pseudo
    reads, read, viewer = [], os.read, Viewer()
    with foreground_terminal(viewer, Terminal(theirs, theirs)):
        monkeypatch.setattr(
            "grpo.observe.terminal.job_control.os.read", lambda *args: reads.append(args) or read(*args)
        )
        os.close(ours)
        for _ in range(20):
            await asyncio.sleep(0.001)
    assert len(reads) == 1
    assert viewer.told == ["show", "hide"]


async def test_in_the_background_the_terminal_is_left_alone_until_the_process_is_in_front(pseudo, monkeypatch):
    _, theirs = pseudo
    group = os.getpgrp() + 1
    monkeypatch.setattr("grpo.observe.terminal.job_control.os.tcgetpgrp", lambda _: group)
    viewer = Viewer()
    with foreground_terminal(viewer, Terminal(theirs, theirs)):
        assert viewer.told == []
        assert waits_for_lines(theirs)
        group = os.getpgrp()
        signal.raise_signal(signal.SIGCONT)
        await viewer.until_told("show")
        assert not waits_for_lines(theirs)
        group += 1
        signal.raise_signal(signal.SIGCONT)  # `bg`
        await viewer.until_told("show", "hide")
        assert not waits_for_lines(theirs)  # by now it is the shell's to change
    assert viewer.told == ["show", "hide"]


def test_files_and_buffers_are_no_terminals(tmp_path, pseudo):
    with (tmp_path / "file").open("w") as file, os.fdopen(os.dup(pseudo[1]), "w") as screen:
        assert terminal_behind(file, None) is None
        assert terminal_behind(io.StringIO(), None) is None
        assert terminal_behind(screen, file) == Terminal(screen.fileno(), None)


class Shell:
    """An interactive shell at a pseudo-terminal."""

    def __init__(self):
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.environ |= {"PYTHONPATH": str(ROOT), "PS1": "[prompt]", "TERM": "dumb"}
            os.execlp("bash", "bash", "--norc", "--noprofile", "--noediting", "-i")
        self._said = ""

    def type(self, keys):
        os.write(self._descriptor, keys.encode())

    def expect(self, text):
        """Read until that is there; gives what stood before it."""
        while text not in self._said:
            assert select.select([self._descriptor], [], [], 20)[0], self._said
            self._said += os.read(self._descriptor, 4096).decode()
        before, _, self._said = self._said.partition(text)
        return before

    def close(self):
        os.kill(self.pid, signal.SIGKILL)  # the kernel hangs up on whoever it has left behind
        os.close(self._descriptor)
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with job control")
def test_a_shell_may_suspend_it_send_it_to_the_background_and_bring_it_back():
    shell = Shell()
    try:
        program = f"{sys.executable} {ROOT}/tests/observe/terminal/attended_program.py"
        shell.expect("[prompt]")
        shell.type(f"{program}\n")
        shell.expect("shown]")
        shell.type("a")
        shell.expect("[key a]")
        shell.type("\x1a")
        shell.expect("[hidden]")
        shell.expect("[prompt]")
        shell.type("stty tostop; stty -a; jobs\n")
        assert " icanon" in shell.expect("Stopped")
        shell.expect("[prompt]")
        shell.type("bg; sleep 0.3; jobs\n")
        assert "shown" not in shell.expect("Running")
        shell.expect("[prompt]")
        shell.type("fg\n")
        shell.expect("shown]")
        shell.type("x")
        shell.expect("[hidden]")
        shell.expect("[prompt]")
        shell.type(f"{program} &\n")
        shell.expect("[prompt]")
        shell.type("sleep 0.7; jobs\n")
        assert "shown" not in shell.expect("Running")
        shell.type("fg\n")
        shell.expect("shown]")
        shell.type("x")
        shell.expect("[hidden]")
    finally:
        shell.close()
