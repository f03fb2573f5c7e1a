from __future__ import annotations

import pytest

from grpo.config.algorithm import TaskConfig
from grpo.errors import ConfigError
from grpo.tasks.base import make_task
from grpo.tasks.sorting import Sorting
from grpo.types import Problem

SORTING = "grpo.tasks.sorting:Sorting"


def test_a_task_is_made_from_its_target_and_arguments():
    task = make_task(TaskConfig(SORTING, {"train_size": 7, "held_out_size": 2}))
    assert isinstance(task, Sorting)
    assert len(task.problems("train")) == 7


def test_the_path_goes_to_a_task_that_reads_a_file(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"question": "2 + 2?", "answer": 4}')
    task = make_task(TaskConfig("grpo.tasks.gsm8k:GSM8K", path=str(tmp_path / "one.jsonl")))
    assert task.problems("train") == [Problem("2 + 2?", "4")]


def test_a_path_for_a_task_that_reads_none_names_the_key():
    with pytest.raises(ConfigError, match=r"^task\.path: grpo\.tasks\.sorting:Sorting reads no file"):
        make_task(TaskConfig(SORTING, path="x.jsonl"))


@pytest.mark.parametrize(
    "target",
    ["grpo.tasks.sorting", "grpo.tasks.sorting:", "grpo.tasks.sorting:Sorter", "grpo.tasks.no_such:Sorting", "math:pi"],
)
def test_an_unknown_target_names_the_key(target):
    with pytest.raises(ConfigError, match=r"^task\.target: ") as raised:
        make_task(TaskConfig(target))
    assert target in str(raised.value)


def test_an_unknown_argument_names_the_key_and_the_known_ones():
    with pytest.raises(ConfigError, match=r"^task\.args: 'train' .*train_size"):
        make_task(TaskConfig(SORTING, {"train": 7}))
