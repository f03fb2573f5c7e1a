import pytest
import torch


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Models this small only lose by sharing work, ten times over on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_ignore_collect(collection_path, config):
    """What needs vLLM runs in the environment that has it: `make test-vllm`."""
    return True if collection_path.name == "test_vllm_engine.py" and config.getoption("--engine") != "vllm" else None
