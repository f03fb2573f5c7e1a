"""In a process of its own: Trackio reads where to write when it is imported, and starts threads."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("trackio", reason="needs the extra trackio")

WRITES = """
import json, sys
from functools import partial
from pathlib import Path
from grpo.observe.sinks.fanout import make_sinks
from trackio.sqlite_storage import SQLiteStorage

def write(step, loss):
    folder = Path(sys.argv[1])
    tell = partial(print, file=sys.stderr)
    sinks = make_sinks({"trackio": {"project": "sorting"}}, folder, {"a": {"b": 1}}, tell)
    sinks.scalars(step, {"step": step, "loss": loss})
    sinks.histogram(step, "ages", [0, 1, 1])
    sinks.histogram(step, "nothing", [])
    sinks.text(step, "samples", [{"prompt": "p", "completion": "c", "reward": 1.0, "advantage": 0.1}])
    sinks.summary({"status": "completed", "steps": step})
    sinks.close()

write(7, 0.5)
write(8, 0.25)
(run,) = SQLiteStorage.get_runs("sorting")
config, logs = SQLiteStorage.get_run_config("sorting", run), SQLiteStorage.get_logs("sorting", run)
written = {"run": run, "logs": logs, "config": config}
Path(sys.argv[1], "read.json").write_text(json.dumps(written))
"""


def test_what_is_written_on_this_machine_is_read_back_under_the_name_of_the_folder(tmp_path):
    folder = tmp_path / "day/run"
    folder.mkdir(parents=True)
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    script = [sys.executable, "-c", WRITES, str(folder)]
    done = subprocess.run(script, env=environment, timeout=600, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    read = json.loads((folder / "read.json").read_text())
    assert (read["run"], read["config"]["a"]) == ("day/run", {"b": 1})
    found = {name: log[name] for log in read["logs"] for name in log if log["step"] == 7}
    assert found["loss"] == 0.5
    assert sum(found["ages"]["values"]) == 3
    assert "nothing" not in found
    assert found["samples"]["_value"] == [{"prompt": "p", "completion": "c", "reward": 1.0, "advantage": 0.1}]
    assert {"name": "status", "value": "completed"} in found["summary"]["_value"]
    assert [log["loss"] for log in read["logs"] if "loss" in log] == [0.5, 0.25]
