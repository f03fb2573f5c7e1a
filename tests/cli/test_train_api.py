"""`from grpo import compose, train`: what a program or a notebook calls."""

import json
import logging

import pytest

import grpo
from grpo import compose, train
from grpo.errors import ConfigError

SMALL = ("eval.prompts=0", "checkpoint.every=0", "observe.report=false", "observe.timeline=false")


@pytest.fixture
def of_tiny_model(tiny_model_path):
    return (*SMALL, "model=hf", f"model.path={tiny_model_path}")


async def test_a_run_beside_a_notebooks_event_loop(of_tiny_model, tmp_path):
    """The loop of this test runs already, as that of a notebook does."""
    folder, handlers = tmp_path / "runs" / "a", logging.root.handlers[:]
    summary = train(compose(*of_tiny_model, "trainer.max_steps=2"), str(folder))
    assert (summary["status"], summary["steps"], summary["error"]) == ("completed", 2, None)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert logging.root.handlers == handlers  # logging stays the caller's


def test_mistakes_are_exceptions(tmp_path):
    with pytest.raises(ConfigError, match=r"^trainer\.max_steps: is 0, must be at least 1"):
        compose("trainer.max_steps=0")
    with pytest.raises(ConfigError, match="no model folder at '/nowhere'"):
        train(compose("model=hf", "model.path=/nowhere"), tmp_path)


def test_a_config_that_was_changed_in_python_is_checked_again(of_tiny_model, tmp_path):
    config = compose(*of_tiny_model)
    config.trainer.max_steps = 0
    with pytest.raises(ConfigError, match=r"^trainer\.max_steps: is 0, must be at least 1"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_its_plan(of_tiny_model, tmp_path, capsys):
    assert train(compose(*of_tiny_model, "dry_run=true"), tmp_path / "run") == {}
    assert "tickets" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_nothing_else_is_public():
    assert set(grpo.__all__) == {"__version__", "compose", "train"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        grpo.trian  # noqa: B018
