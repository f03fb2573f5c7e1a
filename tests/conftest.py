"""A tiny random model on disk, a config to go with it, and a recorder without a screen."""

import io
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo.cluster.connect import ray_cluster
from grpo.config.operation import ClusterConfig
from grpo.config.schema import RunConfig
from grpo.driver.context import make_pacer
from grpo.driver.recorder import Recorder
from grpo.models.tiny import character_tokenizer, tiny_llama
from grpo.observe.run_dir import RunDirectory
from grpo.observe.terminal.display import PlainDisplay
from grpo.services.failures import Failures
from tests.ray_nodes import RayNodes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job, or some CI: the tests' children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is another worker for the other core


def pytest_addoption(parser):
    parser.addoption("--engine", choices=("torch", "vllm"), default="torch", help="the engine of the contract tests")
    parser.addoption("--kills", type=int, default=6, help="processes that each chaos test kills")


def pytest_collection_modifyitems(items):
    """Mark the tests on clusters of several nodes as long: every node takes seconds to start."""
    for item in items:
        if {"nodes", "joined"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)


@pytest.fixture
def kills(request) -> int:
    return request.config.getoption("kills")


@pytest.fixture(scope="session")
def ray_session():
    """One Ray for all integration tests: starting it takes seconds."""
    with ray_cluster(ClusterConfig()):
        yield


@pytest.fixture
def nodes():
    """A Ray cluster of several nodes, none of them started yet."""
    with tempfile.TemporaryDirectory() as folder:  # a short path: Ray's sockets lie in it
        nodes = RayNodes(folder)
        try:
            yield nodes
        finally:
            nodes.close()


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(width=32, layers=2, heads=2).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_config(tiny_model_path) -> RunConfig:
    """Three steps of two groups of four on the sorting task, with a random model."""
    config = RunConfig()
    config.model.path = tiny_model_path
    config.task.target = "grpo.tasks.sorting:Sorting"
    config.task.args = {"train_size": 50, "held_out_size": 8}
    config.rollout.concurrency = 4
    config.rollout.group_size = 4
    config.rollout.max_prompt_tokens = 16
    config.rollout.max_completion_tokens = 8
    config.trainer.max_steps = 3
    config.trainer.groups_per_step = 2
    config.trainer.lr = 1e-2
    config.reward.functions = {"tests.fake_rewards:vowel_share": 1.0}
    config.reward.workers = 1
    config.observe.rollouts_every = 1
    config.watchdog.seconds = 600.0
    config.checkpoint.every = 0
    return config


@pytest.fixture
def make_recorder(tmp_path):
    """Build a recorder for a config; run directories are closed at the end of the test."""
    opened = []

    def make(config: RunConfig, folder: Path | None = None, **options) -> Recorder:
        run_dir = RunDirectory(folder or tmp_path / f"run-{len(opened)}")
        opened.append(run_dir)
        display = PlainDisplay(Console(file=io.StringIO()), config.trainer.max_steps, log_every=1)
        return Recorder(run_dir, display, make_pacer(config), Failures(config.recovery), **options)

    yield make
    for run_dir in opened:
        run_dir.close()
