"""Offline, in a process of its own: W&B starts threads and a service, and changes warnings and the environment."""

import json
import os
import struct
import subprocess
import sys

import pytest

from grpo.observe.sinks.wandb import run_id

pytest.importorskip("wandb", reason="needs the extra wandb")

WRITES = """
import sys, threading
from pathlib import Path
from grpo.observe.sinks.fanout import make_sinks
sinks = make_sinks({"wandb": {"mode": "offline", "project": "sorting"}}, Path(sys.argv[1]), {"a": {"b": 1}}, print)
sinks._close_s = 60
sinks.scalars(7, {"loss": 0.5, "reward/mean": float("nan")})
sinks.histogram(7, "ages", [0, 1, 1])
sinks.histogram(7, "nothing", [])
sinks.text(7, "samples", [{"prompt": "p", "completion": "c", "reward": 1.0, "advantage": 0.1}])
sinks.summary({"status": "completed"})
sinks.close()
assert threading.enumerate() == [threading.main_thread()]
"""


BLOCK, FILE_HEADER, HEADER = 1 << 15, 7, 7


def records(file):
    """W&B's file is LevelDB's log format: blocks of pieces, each with checksum, length and type before it."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), FILE_HEADER, b""
    while at + HEADER < len(data):
        if BLOCK - at % BLOCK < HEADER:  # what is left of a block is padding
            at += BLOCK - at % BLOCK
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or its last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_what_is_written_offline_is_read_back_under_the_id_of_the_folder(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"WANDB_DIR": str(tmp_path)}
    script = [sys.executable, "-c", WRITES, str(tmp_path / "run")]
    done = subprocess.run(script, env=environment, timeout=600, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    found = list(records(file))
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.run_id, run.project) == (run_id(tmp_path / "run"), "sorting")
    assert {item.key for item in run.config.update} >= {"a"}
    rows = [
        {i.nested_key[0] if i.nested_key else i.key: json.loads(i.value_json) for i in r.history.item} for r in found
    ]
    rows = [row for row in rows if row]
    assert rows[0]["loss"] == 0.5
    assert {row["step"] for row in rows} == {7}
    assert [{key for key in ("loss", "ages", "samples") if key in row} for row in rows] == [
        {"loss"},
        {"ages"},
        {"samples"},
    ]
    assert any(item.key == "status" or item.nested_key == ["status"] for r in found for item in r.summary.update)
    assert len(list((tmp_path / "run/wandb").rglob("*.table.json"))) == 1


def test_the_id_belongs_to_the_folder(tmp_path):
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first
    assert run_id(tmp_path / "b") != first
