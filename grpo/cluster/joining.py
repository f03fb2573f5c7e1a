"""Looks at a Ray cluster before it is joined: `ray.init` tries for minutes, and says little of why it could not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from grpo.cluster import probe
from grpo.cluster.placement import Node
from grpo.types import LaunchError


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
