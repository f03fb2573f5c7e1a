"""More of tests/scripts/test_leaving.py, for `make chaos`."""

import signal

import pytest

from tests.scripts.conftest import run_script, train
from tests.scripts.test_leaving import check_that_ending_it_leaves_a_joined_cluster_as_it_was, joined

__all__ = ["joined", "run_script", "train"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_in_order_leaves_a_joined_cluster_as_it_was(train, joined, number):
    check_that_ending_it_leaves_a_joined_cluster_as_it_was(train, joined, number)
