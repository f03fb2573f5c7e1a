import gc

import pytest

from grpo.utils.gc_tuning import collect_as_usual, collect_rarely


@pytest.fixture(autouse=True)
def as_before():
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_what_is_there_once_a_process_has_started_is_left_alone():
    collect_as_usual()  # another test may have typed a command that ended early
    usual = gc.get_threshold()
    collect_rarely()
    assert gc.get_threshold()[0] > 10 * usual[0]
    collect_as_usual()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > 10_000
