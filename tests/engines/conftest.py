import pytest
import torch


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Models this small only lose by sharing work, ten times over on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
