from __future__ import annotations

import json
import re
import sys

import datasets
import pytest

from grpo.errors import ConfigError
from grpo.rewards.final_answer import parse_number
from grpo.tasks.gsm8k import GSM8K
from grpo.types import Problem

ROW = {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}


def rows(count):
    return [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(count)]


@pytest.fixture
def write(tmp_path):
    """Write lines (rows, or text as it is) to a file and return its path."""

    def write(*lines):
        path = tmp_path / "problems.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(path)

    return write


@pytest.fixture
def task(write):
    return GSM8K(write(*rows(100)))


@pytest.fixture
def offline(monkeypatch):
    """A hub that doesn't answer, and nothing downloaded before. Returns what was asked for."""
    calls = []

    def unreachable(*_, **__):
        raise OSError("Name or service\nnot known")

    def nothing_cached(name, subset):
        calls.append((name, subset, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", nothing_cached)
    return calls


def solve(problem):
    return f"The answer is \\boxed{{{problem.answer}}}"


def test_a_share_of_a_file_is_held_out(task):
    train, held_out = ({problem.question for problem in task.problems(split)} for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (95, 5)
    assert not train & held_out


def test_the_split_follows_from_the_seed(write):
    path = write(*rows(100))
    first, again, other = (GSM8K(path, seed=seed).problems("held_out") for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(GSM8K(path, held_out_share=0.5).problems("held_out")) == 50
    assert GSM8K(path, held_out_share=0).problems("held_out") == []


def test_a_question_that_occurs_twice_is_on_one_side(write):
    task = GSM8K(write(*rows(40), *rows(40)), held_out_share=0.5)
    train, held_out = ([problem.question for problem in task.problems(split)] for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (40, 40)
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("48/2 = 24\n#### 1,234", "1234"),
        ("#### -3", "-3"),
        ("####0.5", "0.5"),
        ("#### $18", "18"),
        ("72", "72"),
        (72, "72"),
        (0.5, "0.5"),
    ],
)
def test_the_answer_stands_after_the_marks_or_alone(write, answer, number):
    task = GSM8K(write({"question": "?", "answer": answer}))
    (problem,) = task.problems("train")
    assert parse_number(problem.answer) == parse_number(number)
    assert task.score(problem, f"\\boxed{{{number}}}") == 1
    assert task.score(problem, "\\boxed{7}") == 0


def test_fields_can_have_other_names(write):
    path = write({"problem": "2 + 2?", "solution": 4})
    (problem,) = GSM8K(path, question_field="problem", answer_field="solution").problems("train")
    assert problem == Problem("2 + 2?", "4")


def test_blank_lines_are_passed_over(write):
    assert len(GSM8K(write("", ROW, "  ", ROW, "")).problems("train")) == 2


def test_a_home_folder_is_expanded(write, tmp_path, monkeypatch):
    write(ROW)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(GSM8K("~/problems.jsonl").problems("train")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "2 + 2?", ', """expected a JSON object, got '{"question": "2 + 2?",'"""),
        ("[1, 2]", "expected a JSON object, got [1, 2]"),
        ("[" * 100_000, "expected a JSON object, got '[[[["),
        ({"question": "?"}, "expected the fields question and answer, got ['question']"),
        ({"answer": "4"}, "expected the fields question and answer, got ['answer']"),
        ({"question": "", "answer": "4"}, "expected text in 'question', got ''"),
        ({"question": 7, "answer": "4"}, "expected text in 'question', got 7"),
        ({"question": "?", "answer": "four"}, "expected a number, alone or after ####, in 'answer', got 'four'"),
        ({"question": "?", "answer": "3\n#### 3 or 4"}, "in 'answer', got '3\\n#### 3 or 4'"),
        ({"question": "?", "answer": None}, "in 'answer', got None"),
        ({"question": "?", "answer": True}, "in 'answer', got True"),
        ({"question": "?", "answer": ["4"]}, "in 'answer', got ['4']"),
        ({"question": "?", "answer": float("nan")}, "in 'answer', got nan"),
    ],
)
def test_a_bad_line_is_one_line_that_names_file_and_place(write, line, message):
    path = write(ROW, "", line)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        GSM8K(path)
    assert str(raised.value).startswith(f"task.path: {path}:3: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200 + len(path)


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "café?", "answer": "4"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.jsonl:1: expected a JSON object"):
        GSM8K(str(path))


def test_a_file_that_is_missing_or_empty_says_so(tmp_path, write):
    with pytest.raises(ConfigError, match=r"^task\.path: can't read '.*none\.jsonl': No such file"):
        GSM8K(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"^task\.path: can't read .*: Is a directory"):
        GSM8K(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^task\.path: .*problems\.jsonl' holds no problems"):
        GSM8K(write(""))


@pytest.mark.parametrize("args", [{"held_out_share": 1.0}, {"held_out_share": -0.1}, {"partial_credit": 1.0}])
def test_a_share_or_a_credit_out_of_range_names_the_key(write, args):
    with pytest.raises(ConfigError, match=rf"^task\.args\.{next(iter(args))}: is .* less than 1"):
        GSM8K(write(ROW), **args)


def test_only_the_final_answer_counts(task):
    problem = Problem("48 + 24?", "72")
    assert task.score(problem, "48 + 24 = \\boxed{72.0}") == 1
    assert task.score(problem, "48 + 24 = 72, so \\boxed{71}") == 0
    assert task.score(problem, "\\boxed{71 or 72}") == 0
    assert task.score(problem, "") == 0


def test_partial_credit_is_shared_among_the_numbers_named(write):
    task, problem = GSM8K(write(ROW), partial_credit=0.6), Problem("48 + 24?", "72")
    assert task.score(problem, "72, so \\boxed{72}") == 1
    assert task.score(problem, "72, so \\boxed{71}") == pytest.approx(0.3)
    assert task.score(problem, "70, 71, 72, 73, 74, 70: \\boxed{75}") == pytest.approx(0.1)
    assert task.score(problem, "71, so \\boxed{71}") == 0
    assert task.score(problem, "") == 0


def test_the_hub_is_the_default_and_its_test_split_is_held_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, subset: datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows(3)), "test": datasets.Dataset.from_list([ROW])}
        ),
    )
    task = GSM8K()
    assert [problem.answer for problem in task.problems("train")] == ["0", "2", "4"]
    assert task.problems("held_out") == [Problem("2 + 2?", "4")]
    with pytest.raises(ConfigError, match=r"^task\.args: openai/gsm8k:train:0: expected the fields text and answer"):
        GSM8K(question_field="text")


def test_a_hub_that_cannot_be_reached_names_the_local_alternative(offline):
    with pytest.raises(
        ConfigError, match=r"openai/gsm8k .*Name or service not known.*task\.path=FILE\.jsonl"
    ) as raised:
        GSM8K()
    assert "\n" not in str(raised.value)
    assert offline == [("openai/gsm8k", "main", True)]  # asked once, for what was downloaded before, without the hub


def test_what_was_downloaded_before_needs_no_hub(offline, monkeypatch):
    cached = datasets.DatasetDict({name: datasets.Dataset.from_list(rows(2)) for name in ("train", "test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: cached)
    assert len(GSM8K().problems("train")) == 2


def test_a_missing_library_names_the_line_to_type_and_is_not_needed_for_a_file(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[gsm8k\]', or set a local file, task\.path="):
        GSM8K()
    assert len(GSM8K(write(ROW)).problems("train")) == 1
