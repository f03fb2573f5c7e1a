"""Runs a coroutine beside a Ray cluster: Ctrl-C ends it in order, and a failure is caught at one seam."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from grpo.cluster.connect import ray_cluster
from grpo.config.schema import ClusterConfig
from grpo.types import Status
from grpo.utils.aio import Interrupted

log = logging.getLogger(__name__)
Work = Callable[[asyncio.Event], Coroutine[Any, Any, None]]


def drive(
    cluster: ClusterConfig,
    check: Callable[[], None],
    work: Work,
    on_interrupt: Callable[[], None],
    warn: Callable[[str], None],
) -> tuple[Status, Exception | None]:
    """Run `work(shutdown)` to its end and say how it ended; the error of a failure is in the log too.

    `check()` is called in a thread while Ray starts, which is mostly waiting; the work begins when both are done. The
    first Ctrl-C or SIGTERM calls `on_interrupt` and sets `shutdown`, the second cancels the work. `warn` gets a line
    about the dashboard, where there is one.
    """
    shutdown = asyncio.Event()
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="check") as thread:
            checked = thread.submit(check)
            with ray_cluster(cluster) as dashboard:
                checked.result()
                if dashboard is not None:
                    warn(f"Ray's dashboard: {dashboard} (`ray get-auth-token` prints the token that it asks for)")
                asyncio.run(_until_signalled(work, shutdown, on_interrupt))
    except (KeyboardInterrupt, asyncio.CancelledError, Interrupted):
        return "interrupted", None
    except Exception as error:  # the seam at which a run fails: shown once, kept whole in the log
        log.exception("the run failed")
        return "failed", error
    return ("interrupted" if shutdown.is_set() else "completed"), None


async def _until_signalled(work: Work, shutdown: asyncio.Event, on_interrupt: Callable[[], None]) -> None:
    with _signals(shutdown, on_interrupt):
        await work(shutdown)


@contextmanager
def _signals(shutdown: asyncio.Event, on_interrupt: Callable[[], None]) -> Iterator[None]:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None

    def stop() -> None:
        if shutdown.is_set():
            main.cancel()
        else:
            on_interrupt()
            shutdown.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
