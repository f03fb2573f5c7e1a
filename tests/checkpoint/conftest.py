"""A checkpoint holds the state of a learner: the tests of both take the same one."""

from tests.learner.conftest import make_group, make_learner, model, one_thread, rank_processes, steps_taken

__all__ = ["make_group", "make_learner", "model", "one_thread", "rank_processes", "steps_taken"]
