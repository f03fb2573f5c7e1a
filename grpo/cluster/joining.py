"""Looks at a Ray cluster before it is joined: `ray.init` tries for minutes, and says little of why it could not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from grpo.cluster import probe
from grpo.cluster.placement import Node, check_placement
from grpo.cluster.plan import ActorSpec
from grpo.types import LaunchError

_LOOK_AGAIN_S = 2.0


def wait_for_room(specs: Sequence[ActorSpec], address: str, timeout_s: float, tell: Callable[[str], None]) -> None:
    """Return when the cluster has room for the actors. What it lacks for longer than `timeout_s` is a LaunchError.

    Nodes that were started together join one after the other, the driver's own too. `tell` gets one line when there is
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
                tell(f"waiting up to {timeout_s:g} s for the Ray cluster (cluster.nodes_timeout_s): {lacking}")
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
