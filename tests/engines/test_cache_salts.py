"""Which requests may share prefixes in vLLM's cache: those of the same salt. Needs no vLLM."""

from dataclasses import replace

import pytest

from grpo.engines.vllm import params as params_module
from grpo.engines.vllm.params import CacheSalts
from grpo.types import SamplingParams

FIRST = SamplingParams(n=2, seed=7, keep_prefix=True)
LATER = replace(FIRST, n=1, first_sample=1, first_token=20)
LAST = replace(LATER, first_token=40, keep_prefix=False)


def test_in_flight_the_turns_of_an_episode_keep_the_version_of_the_first():
    salts = CacheSalts("in_flight")
    assert [salts.of(FIRST, 0, version=3), salts.of(FIRST, 1, version=4)] == ["3", "4"]
    assert [salts.of(LATER, 0, version) for version in (4, 5, 6)] == ["4"] * 3
    assert salts.of(LAST, 0, version=7) == "4"
    assert salts.of(replace(LATER, first_sample=0), 0, version=7) == "3"


def test_all_episodes_of_a_greedy_group_keep_the_version_of_the_turn_that_they_share():
    salts = CacheSalts("in_flight")
    assert salts.of(replace(FIRST, temperature=0.0), 0, version=3) == "3"
    later = [replace(LATER, temperature=0.0, first_sample=sample) for sample in (0, 1, 0, 1)]
    assert [salts.of(turn, 0, version) for version, turn in enumerate(later, 4)] == ["3"] * 4


@pytest.mark.parametrize("weight_update", ["in_flight_recompute", "drain"])
def test_otherwise_the_salt_is_the_present_version(weight_update):
    salts = CacheSalts(weight_update)
    assert [salts.of(each, 0, version) for version, each in enumerate((FIRST, LATER, LAST))] == ["0", "1", "2"]


def test_single_turns_have_the_present_version_and_are_not_remembered():
    salts = CacheSalts("in_flight")
    assert salts.of(SamplingParams(seed=7), 1, version=3) == "3"
    assert salts.of(LATER, 0, version=5) == "5"


def test_a_group_that_is_made_again_begins_anew():
    salts = CacheSalts("in_flight")
    assert salts.of(FIRST, 1, version=3) == "3"
    assert salts.of(FIRST, 1, version=5) == "5"
    assert salts.of(LATER, 0, version=6) == "5"


def test_an_episode_that_was_forgotten_keeps_the_version_at_its_next_turn(monkeypatch):
    monkeypatch.setattr(params_module, "_MOST_EPISODES", 2)
    salts = CacheSalts("in_flight")
    for seed in (7, 8, 9):
        salts.of(replace(FIRST, seed=seed), 1, version=3)
    assert salts.of(replace(LATER, seed=9), 0, version=4) == "3"
    assert [salts.of(LATER, 0, version) for version in (5, 6)] == ["5", "5"]
    assert salts.of(replace(LATER, seed=9), 0, version=7) == "3"  # it was used after the others
    assert salts.of(replace(LATER, seed=8), 0, version=7) == "7"
