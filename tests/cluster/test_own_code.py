"""Which code travels."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import grpo
from grpo.cluster.shipping import local_modules, runtime_env


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
