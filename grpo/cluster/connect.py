"""Looks at a Ray cluster before it is joined: `ray.init` tries for minutes, and says little of why it could not."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
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

_LOOK_AGAIN_S = 2.0


def wait_for_room(specs: Sequence[ActorSpec], address: str, timeout_s: float, warn: Callable[[str], None]) -> None:
    """Return when the cluster has room for the actors. What it lacks for longer than `timeout_s` is a LaunchError.

    Nodes that were started together join one after the other, the driver's own too. `warn` gets one line when there is
    something to wait for.
    """
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        try:
            return check_placement(specs, nodes_at(address), "the Ray cluster")
        except LaunchError as lacking:
            if time.monotonic() >= deadline:
                raise
            if not told:
                warn(f"waiting up to {timeout_s:g} s for the Ray cluster (cluster.wait_for_nodes_s): {lacking}")
                told = True
            time.sleep(_LOOK_AGAIN_S)


def nodes_at(address: str) -> list[Node]:
    """The nodes of the cluster at `auto` or `host:port`. LaunchError, with the fix, where it can't be joined."""
    done = subprocess.run([sys.executable, probe.__file__, address], capture_output=True, text=True)
    if done.returncode == -signal.SIGALRM:
        raise LaunchError(f"cluster.address: something listens at {address}, but no Ray of this version answers")
    if done.returncode:
        raise LaunchError(f"cluster.address: can't look at {address}: {done.stderr.strip()[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise LaunchError(f"cluster.address: {found['error']}")
    return [Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in found["nodes"]]


_DASHBOARD_PACKAGES = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client")  # some of ray[default]


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[str | None]:
    """Join the cluster at `cluster.address`, or start one on this machine that ends with the run, however that ends.

    Gives the address of the dashboard where `cluster.dashboard` started one. Raises LaunchError when there is no
    cluster at that address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour that Ray announces
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # those of cancelled calls
    # Freed objects give their memory back at once, not once a second: the next weights find its pages mapped, and
    # copying into fresh ones takes six times as long.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    with session_reaper():
        try:
            with _signals_held_back():
                dashboard = _connect(config)
            yield dashboard
        finally:
            ray.shutdown()


def check_dashboard(config: ClusterConfig) -> None:
    """Raise ConfigError when it is wanted and Ray came without it."""
    if config.dashboard and not all(map(importlib.util.find_spec, _DASHBOARD_PACKAGES)):
        raise ConfigError("is not installed: pip install -e '.[dashboard]'", key="cluster.dashboard")


def _connect(config: ClusterConfig) -> str | None:
    address = config.address
    if address is not None:
        nodes_at(address)
    try:
        with TemporaryDirectory() as empty:
            there = ray.init(
                address=address or "local",
                include_dashboard=None if address else config.dashboard,
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env(empty) if address else None,
                log_to_driver=True,  # into the run's log: the driver's own stdout leads there
                logging_level=logging.WARNING,
            )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # of versions that differ, it lists them line by line
        raise LaunchError(f"cluster.address: can't reach Ray at {address or 'local'}: {reason}") from error
    except SystemExit as ended:  # by Ray's handler of SIGTERM, which it puts in the place of ours
        raise KeyboardInterrupt from ended
    return f"http://{there.dashboard_url}" if config.dashboard else None


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait: interrupted half-way, `ray.init` leaves processes behind."""
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt
