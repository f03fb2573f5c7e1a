"""Old names of metrics: written beside the new ones, and read."""

import json

import pytest

from grpo.observe.renamed_metrics import RENAMED_METRICS, with_new_names, with_old_names

LINE = {
    "step": 3,
    "mismatch/logprob_abs_diff": 0.1,
    "mismatch/logprob_abs_diff_same_version": 0.2,
    "mismatch/kl_k1": 0.3,
    "mismatch/kl_k3": 0.4,
    "mismatch/age_0/kl_k1": 0.5,
    "mismatch/age_12/kl_k3": 0.6,
    "mismatch/age_12/is_clip_fraction": 0.7,
    "mismatch/age_12/tokens": 9.0,
    "trainer/is_clip_fraction": 0.8,
    "time/weight_load_s": 0.9,
    "generator/batch_size/mean": 1.0,
    "generator/batch_size/p99": 1.1,
    "rollout/tickets_in_use": 1.2,
    "rollout/zero_variance_dropped": 1.3,
    "recovery/groups_requeued": 1.4,
}
OLD = {
    "mismatch/behavior_abs": 0.1,
    "mismatch/same_version_abs": 0.2,
    "mismatch/behavior_k1": 0.3,
    "mismatch/behavior_k3": 0.4,
    "mismatch/age_0/behavior_k1": 0.5,
    "mismatch/age_12/behavior_k3": 0.6,
    "mismatch/age_12/correction_held_fraction": 0.7,
    "trainer/correction_held_fraction": 0.8,
    "time/weights_live_s": 0.9,
    "generator/rows/mean": 1.0,
    "generator/rows/p99": 1.1,
    "rollout/outstanding": 1.2,
    "rollout/zero_advantage_dropped": 1.3,
    "recovery/groups_begun_again": 1.4,
}


def test_a_line_has_every_old_name_with_the_same_value():
    assert with_old_names(LINE) == LINE | OLD


def test_a_summary_has_its_old_name_too():
    assert with_old_names({"groups_requeued": {"resumed": 2}}) == {
        "groups_requeued": {"resumed": 2},
        "groups_begun_again": {"resumed": 2},
    }


def test_every_name_of_the_table_is_covered():
    bare = {
        name.replace("age_0/", "").replace("age_12/", "").removesuffix("/mean").removesuffix("/p99") for name in OLD
    }
    assert bare | {"groups_begun_again"} == set(RENAMED_METRICS)


@pytest.mark.parametrize("record", [with_old_names(LINE), {"step": 3, "mismatch/age_12/tokens": 9.0} | OLD])
def test_lines_of_this_and_of_earlier_versions_are_read_alike(record):
    assert with_new_names(json.loads(json.dumps(record))) == LINE
