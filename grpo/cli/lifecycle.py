"""From Ray's start to the end of a run: checks beside the start, interruptions, and the seam at which a run fails."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from grpo.cluster.connect import ray_cluster
from grpo.config.operation import ClusterConfig
from grpo.types import Status
from grpo.utils.aio import Interrupted

R = TypeVar("R")
log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Status of a run that has ended. `error` is set where it is "failed"."""

    status: Status = "completed"
    error: Exception | None = None


@contextmanager
def outcome_of_run() -> Iterator[Outcome]:
    """Catch whatever ends the block, at the one seam where a run may fail; the log keeps the whole traceback."""
    outcome = Outcome()
    try:
        yield outcome
    except (KeyboardInterrupt, asyncio.CancelledError, Interrupted):
        outcome.status = "interrupted"
    except Exception as error:
        log.exception("the run failed")
        outcome.status, outcome.error = "failed", error


@contextmanager
def ray_beside(check: Callable[[], None], cluster: ClusterConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Start or join Ray for the block, and call `check()` in a thread meanwhile: starting is mostly waiting.

    The block begins when both are done. `say` gets a line about the dashboard, where there is one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="check") as thread:
        checked = thread.submit(check)
        with ray_cluster(cluster) as dashboard:
            checked.result()
            if dashboard is not None:
                say(f"Ray's dashboard: {dashboard} (`ray get-auth-token` prints the token that it asks for)")
            yield


class Interrupts:
    """Requests to stop: the first lets the step under way finish, the second ends the run at once.

    Requests are Ctrl-C and SIGTERM where the run has the main thread, and calls of `request` from any thread.

    Example:
        interrupts = Interrupts()
        with interrupts.listening(lambda: print("stopping ...")) as shutdown:     # in a coroutine
            await run_until_set(shutdown, work())
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], None] | None = None
        self._early = False  # a request that came before anything listened

    def request(self) -> None:
        """Ask for the end. Safe to call from any thread."""
        if self._loop is None or self._stop is None:
            self._early = True
        else:
            self._loop.call_soon_threadsafe(self._stop)

    @contextmanager
    def listening(self, on_first: Callable[[], None]) -> Iterator[asyncio.Event]:
        """Yield the event that the first request sets, after `on_first()`; the second cancels the present task.

        Raises Interrupted at the end of the block when there was a request.
        """
        shutdown, main = asyncio.Event(), asyncio.current_task()
        assert main is not None

        def stop() -> None:
            if shutdown.is_set():
                main.cancel()
            else:
                on_first()
                shutdown.set()

        self._loop, self._stop = asyncio.get_running_loop(), stop
        # Python delivers signals to the main thread only; elsewhere `request` is all there is.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        for number in numbers:
            self._loop.add_signal_handler(number, stop)
        if self._early:
            stop()
        try:
            yield shutdown
        finally:
            for number in numbers:
                self._loop.remove_signal_handler(number)
            self._stop = None
        if shutdown.is_set():
            raise Interrupted


def call_beside_event_loop(interrupts: Interrupts, work: Callable[[], R]) -> R:
    """Call `work`, which starts an event loop; where this thread already runs one, as in a notebook, in a new thread.

    An interruption of the notebook's cell becomes a request to stop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="run") as thread:
        running = thread.submit(work)
        while True:
            try:
                return running.result()
            except KeyboardInterrupt:
                interrupts.request()
