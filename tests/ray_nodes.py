"""Ray clusters of several nodes on this machine: each node has a raylet and an object store of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


class RayNodes:
    """A head and what has joined it; a node is the session of its processes. The cluster asks for a token."""

    def __init__(self, folder):
        self._folder, self._sessions = folder, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(self, cpus, hidden=()):
        """Start a node, the head at first; returns its session.

        One with `hidden` folders sees them empty, as well as Ray's own and /dev/shm: as on another machine, with
        another user's home, on which only Python's environment is the same.
        """
        place = [f"--address={self.address}"] if self._sessions else self._head()
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, f"--num-cpus={cpus}", *ports]
        apart, places = [], [*map(str, hidden), self._folder, "/dev/shm"]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        if hidden:
            mounts = "".join(f"mount -t tmpfs none '{place}' && " for place in places)
            apart = ["unshare", "--mount", "sh", "-c", f'{mounts} cd / && exec "$@"', "sh"]
            environment |= {"PYTHONPATH": "", "HOME": f"{self._folder}/home", "XDG_CACHE_HOME": ""}
        for _ in range(10):  # Ray gives a node 30 s to start, which a busy machine may not manage
            starting = subprocess.Popen(
                [*apart, *command, "--disable-usage-stats"],
                env=environment,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._sessions.append(starting.pid)
            if starting.wait(timeout=300) == 0:
                return starting.pid
            self.kill(starting.pid)
        raise AssertionError("no node starts")

    def kill(self, node):
        """End all of its processes at once, as when the machine loses its power."""
        for process in members(node):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def close(self):
        for session in self._sessions:
            self.kill(session)
        deadline = time.monotonic() + 60
        while left := [process for session in self._sessions for process in members(session)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def _head(self):
        port = self.address.rpartition(":")[2]
        return ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._folder}"]


class JoinedNode:
    """One of a cluster that is not a run's own: the address, its session, and the processes that it began with."""

    def __init__(self, address, session):
        self.address, self.session = address, session
        self.own = members(session).keys()

    def guests(self):
        return {process: command for process, command in members(self.session).items() if process not in self.own}

    def guests_after_a_while(self):
        deadline = time.monotonic() + 60
        while self.guests() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.guests()

    def is_whole(self):
        return self.own <= members(self.session).keys()


def members(session):
    """Process id and command line of the living processes of a session."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(entry)) == session:
                found[int(entry)] = Path("/proc", entry, "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {process: command for process, command in found.items() if command}  # a zombie has none
