"""Ranks on a cluster of several nodes."""

import json
import os
import subprocess
import sys

from tests.ray_nodes import ENVIRONMENT, ROOT


def test_ranks_share_a_node_where_one_has_room_for_all(nodes):
    for _ in range(2):
        nodes.start(cpus=2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.placed_ranks", nodes.address],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["beside generators"]) == len(found["others hold room"]) == 2
    assert len(set(found["beside generators"])) == 1
    assert len(set(found["others hold room"])) == 2
