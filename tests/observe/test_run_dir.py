import json
import logging
import math
import resource

import pytest

from grpo.errors import ConfigError
from grpo.observe.run_dir import RunDirectory, to_json


def test_lines_and_files_are_on_disk_after_close(tmp_path):
    run_dir = RunDirectory(tmp_path / "run")
    for step in range(3):
        run_dir.append("metrics.jsonl", {"step": step})
    run_dir.write_json("summary.json", {"status": "completed"})
    run_dir.close()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"status": "completed"}


def test_numbers_that_are_not_finite_become_null():
    assert (
        to_json({"a": math.nan, "b": [1.5, math.inf], "c": (1, "x")}) == '{"a": null, "b": [1.5, null], "c": [1, "x"]}'
    )


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir: can't write to .*file/run"):
        RunDirectory(tmp_path / "file/run")


def test_a_folder_that_holds_a_run_is_not_used_again(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    run_dir = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        run_dir.refuse_old_runs()
    run_dir.close()


def test_two_runs_cannot_have_one_folder(tmp_path):
    run_dir = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match="in use by another run"):
        RunDirectory(tmp_path)
    run_dir.close()
    RunDirectory(tmp_path).close()


def test_a_resumed_run_cuts_what_was_written_after_the_checkpoint(tmp_path):
    run_dir = RunDirectory(tmp_path)
    run_dir.append("metrics.jsonl", {"step": 1})
    sizes = run_dir.sizes().result()
    run_dir.append("metrics.jsonl", {"step": 2})
    run_dir.append("ledger.jsonl", {"step": 2})
    run_dir.close()
    assert sizes == {"metrics.jsonl": len('{"step": 1}\n')}
    resumed = RunDirectory(tmp_path)
    resumed.cut(sizes)
    assert resumed.read("metrics.jsonl") == [{"step": 1}]
    assert resumed.read("ledger.jsonl") == resumed.read("nothing.jsonl") == []
    resumed.close()


def test_a_run_that_goes_on_is_not_over(tmp_path):
    run_dir = RunDirectory(tmp_path)
    run_dir.write_json("summary.json", {"status": "completed"})
    run_dir.close()
    resumed = RunDirectory(tmp_path)
    resumed.cut({})
    assert not (tmp_path / "summary.json").exists()
    resumed.close()


def test_a_disk_that_fills_up_leaves_no_half_line(tmp_path):
    run_dir = RunDirectory(tmp_path)
    run_dir.append("metrics.jsonl", {"step": 1})
    size = run_dir.sizes().result()["metrics.jsonl"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
        run_dir.append("metrics.jsonl", {"step": 2})
        assert run_dir.sizes().result() == {"metrics.jsonl": size}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run_dir.append("metrics.jsonl", {"step": 3})
    run_dir.close()
    assert run_dir.read("metrics.jsonl") == [{"step": 1}, {"step": 3}]
    assert run_dir.write_errors == 1


def test_a_write_that_fails_is_counted_and_logged_but_does_not_raise(tmp_path, caplog):
    run_dir = RunDirectory(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with caplog.at_level(logging.ERROR):
        run_dir.append("metrics.jsonl", {"step": 1})
        run_dir.close()
    assert run_dir.write_errors == 1
    assert "could not write" in caplog.text
