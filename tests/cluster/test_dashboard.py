"""With the extra `dashboard`, in a process of its own: a process has one Ray."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra dashboard")

EXPORTS = """
import json, sys, time, urllib.request
from pathlib import Path
import ray
from grpo.cluster.connect import ray_cluster
from grpo.cluster.ray_metrics import RaySink
from grpo.config.operation import ClusterConfig

def exported(address):
    while True:
        text = urllib.request.urlopen(address, timeout=60).read().decode()
        if found := [line for line in text.splitlines() if line.startswith("ray_grpo_")]:
            return found
        time.sleep(0.1)

with ray_cluster(ClusterConfig(dashboard=True)) as dashboard:
    sink = RaySink(Path("/runs/day/run"), {})
    sink.scalars(1, {"reward/mean": 0.5})
    (node,) = ray.nodes()
    lines = exported(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    page = urllib.request.urlopen(dashboard, timeout=60).read().decode()
    sink.close()
Path(sys.argv[1]).write_text(json.dumps({"dashboard": dashboard, "page": page, "lines": lines}))
"""


def test_a_cluster_of_our_own_has_a_dashboard_on_localhost_and_exports_the_gauges(tmp_path):
    environment = os.environ | {"RAY_metrics_report_interval_ms": "500"}
    subprocess.run([sys.executable, "-c", EXPORTS, str(tmp_path / "seen")], env=environment, timeout=600, check=True)
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["dashboard"].startswith("http://127.0.0.1:")
    assert "Ray Dashboard" in seen["page"]
    (line,) = seen["lines"]
    assert line.startswith("ray_grpo_reward_mean{")
    assert 'run="day/run"' in line
    assert line.endswith(" 0.5")
