"""Files of one node that are read on another, with real Ray; and which code is shipped.

What is hidden is what the node would not see.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
from grpo.cluster import shipping
from grpo.cluster.shipping import list_files, local_modules, runtime_env, ship_config
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model/inner").mkdir(parents=True)
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/inner/weights").write_bytes(os.urandom(2500))
    (tmp_path / "model/inner/nothing").touch()
    (tmp_path / "model/link").symlink_to(tmp_path / "model/inner/weights")
    (tmp_path / "problems.jsonl").write_text("one\ntwo\n")
    config = RunConfig()
    config.model.path, config.task.path = str(tmp_path / "model"), str(tmp_path / "problems.jsonl")
    return config


@pytest.fixture
def hidden(ray_session, monkeypatch, tmp_path):
    """This process looks at a disk on which there is nothing; the node's other ones see all."""
    import ray

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shipping, "_CHUNK_BYTES", 300)

    def hide(config):
        sent = ship_config(config, ray.get_runtime_context().get_node_id())
        monkeypatch.setattr(shipping, "list_files", lambda path: ())
        return sent

    return hide


def test_a_node_that_has_the_files_reads_its_own(config):
    assert ship_config(config, "a node that nobody asks").localize() == config


def test_a_node_without_them_gets_a_copy_once(config, hidden, monkeypatch):
    sent = hidden(config)
    got = sent.localize()
    assert got.model.path != config.model.path
    subprocess.run(["diff", "-r", got.model.path, config.model.path], check=True)
    subprocess.run(["diff", got.task.path, config.task.path], check=True)
    monkeypatch.setattr(shipping, "_read_chunk", None)
    assert sent.localize() == got


def test_files_that_have_changed_since_are_not_taken_for_those_of_the_run(config, hidden):
    sent = hidden(config)
    with open(config.task.path, "a") as problems:
        problems.write("three\n")
    with pytest.raises(ConfigError, match=r"task\.path: .*problems\.jsonl has changed since the run began"):
        sent.localize()


def test_names_of_the_hub_stay_as_they_are(hidden):
    config = RunConfig()
    config.model.path = "somebody/model"
    assert hidden(config).localize() == config


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert list_files(str(tmp_path / "nowhere")) == ()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Modules of a user's, and a library that pip has installed beside them."""
    (tmp_path / "mine/my_package").mkdir(parents=True)
    (tmp_path / "mine/my_package/__init__.py").write_text("import my_module")
    (tmp_path / "mine/my_package/inner.py").touch()
    (tmp_path / "mine/my_module.py").touch()
    (tmp_path / "mine/my_folder").mkdir()
    (tmp_path / "mine/my_folder/inner.py").touch()
    (tmp_path / "libraries/some_library.dist-info").mkdir(parents=True)
    (tmp_path / "libraries/some_library.py").touch()
    for folder in ("mine", "libraries"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    before = set(sys.modules)
    for name in ("my_package.inner", "my_folder.inner", "some_library"):
        importlib.import_module(name)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_is_imported_and_not_installed_travels(disk):
    there = {Path(place) for place in runtime_env("/empty")["py_modules"]}
    assert there >= {disk / "mine/my_package", disk / "mine/my_module.py", disk / "mine/my_folder"}
    assert not [place for place in there if disk / "libraries" in place.parents]
    assert Path(grpo.__file__).parent in there
    assert not [place for place in there if {"site-packages", "torch", "json"} & {*place.parts, place.stem}]


def test_a_package_that_is_a_library_stays(disk):
    modules = {"my_package": sys.modules["my_package"], "__main__": sys.modules["my_module"]}
    assert local_modules(modules, []) == {disk / "mine/my_package"}
    assert local_modules(modules, [disk / "mine"]) == set()


@pytest.mark.parametrize(
    ("job", "folder"),
    [(None, "/empty"), ({"runtime_env": {}}, "/empty"), ({"runtime_env": {"working_dir": "x"}}, None)],
)
def test_actors_work_in_an_empty_folder_or_in_that_of_the_job(monkeypatch, job, folder):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if job is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert runtime_env("/empty").get("working_dir") == folder
