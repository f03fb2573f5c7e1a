"""Serve the report of a running run: each request is answered with the current contents of its folder."""

from __future__ import annotations

import errno
import threading
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from grpo.errors import NothingTrained, ReportError
from grpo.observe.run_dir import to_json
from grpo.report.data import Record, check_folder, read_run, read_summary
from grpo.report.page import name_of, page, run_data
from grpo.report.timeline import MOST_SPANS, read_timeline

_FILES = ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "events.jsonl", "timeline.json", "summary.json")


class LiveRun:
    """The page's data for a run's folder, read again when one of its files has changed."""

    def __init__(self, folder: Path, from_s: float = 0.0) -> None:
        """Raises ReportError when the folder holds no run; a run that has not started yet is fine."""
        check_folder(folder)
        self._folder, self._from_s = folder, from_s
        self._lock = threading.Lock()  # requests are concurrent; reading the same files twice is wasted work
        self._stamp = ""
        self._data: Record = {}
        self._timeline: Record | None = None

    def data(self) -> Record:
        """Return the page's data with `live`: a `stamp` of the files during the run, None after its end.

        Of a run without a step the data has only its name and a message.
        """
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._data = self._read() | {"live": None if self._has_ended() else {"stamp": stamp}}
                self._stamp = stamp
            return self._data

    def _read(self) -> Record:
        try:
            run = read_run(self._folder)
        except NothingTrained:
            return {"runs": [], "name": name_of(self._folder), "waiting": self._waiting()}
        return run_data(run, self._read_timeline())

    def _read_timeline(self) -> Record | None:
        """Read the timeline; one that fills the page already is read again only at the end of the run."""
        is_full = self._timeline is not None and len(self._timeline["spans"]) >= MOST_SPANS
        if not is_full or self._has_ended():
            self._timeline = read_timeline(self._folder / "timeline.json", from_s=self._from_s)
        return self._timeline

    def _waiting(self) -> str:
        if not self._has_ended():
            return "waiting for the first train step: the run is starting"
        return f"no step was trained: {read_summary(self._folder, []).get('error') or 'the run has ended'}"

    def _has_ended(self) -> bool:
        return (self._folder / "summary.json").exists()

    def _stamp_now(self) -> str:
        stats = [file.stat() for name in _FILES if (file := self._folder / name).exists()]
        return f"{zlib.crc32(repr([(each.st_size, each.st_mtime_ns) for each in stats]).encode()):08x}"


class ReportServer(ThreadingHTTPServer):
    """Serves the page at `/` and its data at `/data?stamp=...`, or 204 when the stamp is still current."""

    daemon_threads = True

    def __init__(self, run: LiveRun, host: str, port: int) -> None:
        """Raises ReportError when it can't listen on this address."""
        self.run = run
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            message = f"can't listen on {host}, port {port}: {error.strerror}; see --host and --port"
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} is in use; name another with --port, or 0 for any free port"
            raise ReportError(message) from error

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            self._answer(200, page(self.server.run.data()), "text/html")
        elif url.path == "/data":
            data = self.server.run.data()
            is_known = data["live"] and [data["live"]["stamp"]] == parse_qs(url.query).get("stamp")
            self._answer(204) if is_known else self._answer(200, to_json(data), "application/json")
        else:
            self.send_error(404)

    def _answer(self, status: int, text: str = "", kind: str = "text/plain") -> None:
        body = text.encode()
        with suppress(ConnectionError):  # the browser was closed
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *about: Any) -> None:
        """Keep requests out of the terminal."""
