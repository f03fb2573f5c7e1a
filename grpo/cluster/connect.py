"""Join a Ray cluster, or start one on this machine; check first that it can be joined and has room.

The check is here since `ray.init` tries for minutes, and says little about why it fails.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import ray
from ray.exceptions import RayError

from grpo.actors.specs import ActorSpec
from grpo.cluster import probe
from grpo.cluster.placement import Node, check_placement
from grpo.cluster.reaper import session_reaper
from grpo.cluster.shipping import runtime_env
from grpo.config.operation import ClusterConfig
from grpo.errors import ConfigError, LaunchError

_RETRY_S = 2.0
_DASHBOARD_PACKAGES = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client")  # some of ray[default]


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[str | None]:
    """Join the cluster at `cluster.address`, or start one on this machine that ends with the run, however that ends.

    Gives the address of the dashboard if `cluster.dashboard` started one. Raises LaunchError when there is no cluster
    at the address.

    Example:

        with ray_cluster(config.cluster):
            asyncio.run(work())  # in which `launch(config, failures)` starts the actors
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour that Ray announces
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # errors of cancelled calls
    # Free the memory of objects at once, not once a second: the next weights find its pages mapped. Copying into fresh
    # pages takes six times as long.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    # Ray runs actors at niceness 15. Beside three busy programs on two cores they would get 2% of a core, and importing
    # torch would take minutes.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with session_reaper():
        try:
            with _signals_held_back():
                dashboard = _connect(config)
            yield dashboard
        finally:
            ray.shutdown()


def _connect(config: ClusterConfig) -> str | None:
    address = config.address
    if address is not None:
        nodes_at(address)
    try:
        with TemporaryDirectory() as empty:
            context = ray.init(
                address=address or "local",
                include_dashboard=None if address else config.dashboard,
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env(empty) if address else None,
                log_to_driver=True,  # into the run's log: the driver's own stdout leads there
                logging_level=logging.WARNING,
            )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # Ray lists versions that differ line by line
        raise LaunchError(f"cluster.address: can't reach Ray at {address or 'local'}: {reason}") from error
    except SystemExit as ended:  # raised by Ray's handler of SIGTERM, which replaces ours
        raise KeyboardInterrupt from ended
    return f"http://{context.dashboard_url}" if config.dashboard else None


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block ends: `ray.init` leaves processes behind when it is interrupted."""
    held: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def check_dashboard(config: ClusterConfig) -> None:
    """Raise ConfigError when the dashboard is wanted and Ray was installed without it."""
    if config.dashboard and not all(map(importlib.util.find_spec, _DASHBOARD_PACKAGES)):
        raise ConfigError("is not installed: pip install -e '.[dashboard]'", key="cluster.dashboard")


def wait_for_room(specs: Sequence[ActorSpec], address: str, timeout_s: float, warn: Callable[[str], None]) -> None:
    """Wait until the cluster has room for the actors. Raises LaunchError when it has none after `timeout_s`.

    Nodes that are started together join one after the other, the driver's node too. `warn` gets one line when there is
    something to wait for.
    """
    deadline = time.monotonic() + timeout_s
    warned = False
    while True:
        try:
            return check_placement(specs, nodes_at(address), "the Ray cluster")
        except LaunchError as error:
            if time.monotonic() >= deadline:
                raise
            if not warned:
                warn(f"waiting up to {timeout_s:g} s for the Ray cluster (cluster.wait_for_nodes_s): {error}")
                warned = True
            time.sleep(_RETRY_S)


def nodes_at(address: str) -> list[Node]:
    """Return the nodes of the cluster at `auto` or `host:port`. Raises LaunchError if it can't be joined."""
    done = subprocess.run([sys.executable, probe.__file__, address], capture_output=True, text=True)
    if done.returncode == -signal.SIGALRM:
        raise LaunchError(f"cluster.address: something listens at {address}, but no Ray of this version answers")
    if done.returncode:
        raise LaunchError(f"cluster.address: can't probe {address}: {done.stderr.strip()[-1000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise LaunchError(f"cluster.address: {answer['error']}")
    return [Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in answer["nodes"]]
