import pytest

from grpo.cluster.launch import ray_cluster
from grpo.config import ClusterConfig


@pytest.fixture(scope="session")
def ray_session():
    """One Ray for all integration tests: starting it takes seconds."""
    with ray_cluster(ClusterConfig()):
        yield
