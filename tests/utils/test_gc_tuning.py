import gc

import pytest

from grpo.utils.gc_tuning import relax_gc, restore_gc


@pytest.fixture(autouse=True)
def as_before():
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_what_is_there_once_a_process_has_started_is_left_alone():
    restore_gc()  # another test may have typed a command that ended early
    usual = gc.get_threshold()
    relax_gc()
    assert gc.get_threshold()[0] > 10 * usual[0]
    restore_gc()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > 10_000
