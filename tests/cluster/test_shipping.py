"""Files of one node that are read on another, with real Ray; what is hidden is what the node would not see."""

import os
import subprocess

import pytest

from grpo.cluster import shipping as files
from grpo.cluster.shipping import carried, found_at
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ray_session")


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
def hidden(monkeypatch, tmp_path):
    """This process looks at a disk on which there is nothing; the node's other ones see all."""
    import ray

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_CHUNK_BYTES", 300)

    def hide(config):
        sent = carried(config, ray.get_runtime_context().get_node_id())
        monkeypatch.setattr(files, "found_at", lambda path: ())
        return sent

    return hide


def test_a_node_that_has_the_files_reads_its_own(config):
    assert carried(config, "a node that nobody asks").here() == config


def test_a_node_without_them_gets_a_copy_once(config, hidden, monkeypatch):
    sent = hidden(config)
    got = sent.here()
    assert got.model.path != config.model.path
    subprocess.run(["diff", "-r", got.model.path, config.model.path], check=True)
    subprocess.run(["diff", got.task.path, config.task.path], check=True)
    monkeypatch.setattr(files, "_read", None)
    assert sent.here() == got


def test_files_that_have_changed_since_are_not_taken_for_those_of_the_run(config, hidden):
    sent = hidden(config)
    with open(config.task.path, "a") as problems:
        problems.write("three\n")
    with pytest.raises(ConfigError, match=r"task\.path: .*problems\.jsonl was changed after the run had begun"):
        sent.here()


def test_names_of_the_hub_stay_as_they_are(hidden):
    config = RunConfig()
    config.model.path = "somebody/model"
    assert hidden(config).here() == config


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert found_at(str(tmp_path / "nowhere")) == ()
