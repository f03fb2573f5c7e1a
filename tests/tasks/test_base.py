from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from grpo.config.algorithm import TaskConfig
from grpo.config.composition import compose
from grpo.errors import ConfigError, TaskError
from grpo.models.tiny import character_tokenizer
from grpo.tasks.base import PromptEncoder, Task, make_task
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
    with pytest.raises(ConfigError, match=r"^task\.path: grpo\.tasks\.sorting:Sorting does not read a file"):
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
    with pytest.raises(
        ConfigError, match=r"^task\.args: 'train' .*train_size.*; '~task\.args' drops those of the default"
    ):
        make_task(TaskConfig(SORTING, {"train": 7}))


def test_the_command_in_the_docstring_sets_the_arguments_of_that_task_alone():
    [command] = re.findall(r"grpo train (.*)", Task.__doc__)
    task = compose(*shlex.split(command)).task
    assert (task.target, task.args) == ("my_module:Doubling", {"largest": 200})


PLAIN = TaskConfig("grpo.tasks.sorting:Sorting")
CHAT = TaskConfig(PLAIN.target, template="chat")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}#{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class NoProblems(Sorting):
    def problems(self, split):
        return []


@pytest.fixture
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_plain_is_the_question_as_it_is(tokenizer):
    ids = PromptEncoder(tokenizer, PLAIN, 10).encode(Problem("cab>", "abc"))
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == "cab>"


def test_chat_goes_through_the_template_and_opens_the_answer(chat_tokenizer):
    ids = PromptEncoder(chat_tokenizer, CHAT, 100).encode(Problem("cab>", "abc"))
    assert chat_tokenizer.decode(ids) == "user: cab>#assistant:"


def test_a_system_prompt_stands_first(chat_tokenizer):
    config = TaskConfig(CHAT.target, template="chat", system_prompt="Be brief.")
    ids = PromptEncoder(chat_tokenizer, config, 100).encode(Problem("cab>", "abc"))
    assert chat_tokenizer.decode(ids) == "system: Be brief.#user: cab>#assistant:"


def test_an_empty_system_prompt_takes_the_place_of_the_templates_own(chat_tokenizer):
    chat_tokenizer.chat_template = "{% if messages[0].role != 'system' %}system: Own.#{% endif %}" + TEMPLATE
    for system_prompt, start in ((None, "system: Own.#user"), ("", "system: #user")):
        config = TaskConfig(CHAT.target, template="chat", system_prompt=system_prompt)
        ids = PromptEncoder(chat_tokenizer, config, 100).encode(Problem("cab>", "abc"))
        assert chat_tokenizer.decode(ids).startswith(start)


def test_special_tokens_of_the_template_are_not_added_twice(chat_tokenizer):
    chat_tokenizer.chat_template = "<eos>" + TEMPLATE
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", None, [("<eos>", 1)])
    problem = Problem("cab>", "abc")
    for config in (PLAIN, CHAT):  # a plain prompt gets them from the tokenizer
        ids = PromptEncoder(chat_tokenizer, config, 100).encode(problem).tolist()
        assert (ids[0], ids.count(1)) == (1, 1)


def test_chat_without_a_template_names_the_key(tokenizer):
    with pytest.raises(ConfigError, match=r"^task\.template: .*task\.template=plain"):
        PromptEncoder(tokenizer, CHAT, 100)


def test_a_template_that_refuses_a_system_message_names_the_key(chat_tokenizer):
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}"
    chat_tokenizer.chat_template = refusal + TEMPLATE
    task = Sorting(train_size=2, held_out_size=1)
    config = TaskConfig(CHAT.target, template="chat", system_prompt="Be brief.")
    with pytest.raises(ConfigError, match=r"^task\.system_prompt: .*\(System role not supported\).*system_prompt=null"):
        PromptEncoder(chat_tokenizer, config, 100).check_usable(task)
    PromptEncoder(chat_tokenizer, CHAT, 100).check_usable(task)


def test_a_template_that_cannot_be_filled_in_names_the_key(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for message in messages %}"
    with pytest.raises(ConfigError, match=r"^task\.template: .*task\.template=plain"):
        PromptEncoder(chat_tokenizer, CHAT, 100).encode(Problem("cab>", "abc"))


@pytest.mark.parametrize(("question", "fits"), [("cab>", True), ("cabd>", False), ("", False)])
def test_only_prompts_within_the_limit_are_encoded(tokenizer, question, fits):
    assert (PromptEncoder(tokenizer, PLAIN, 4).encode(Problem(question, "")) is not None) == fits


def test_the_template_counts_towards_the_limit(chat_tokenizer):
    length = len("user: cab>#assistant:")
    problem = Problem("cab>", "abc")
    assert PromptEncoder(chat_tokenizer, CHAT, length).encode(problem) is not None
    assert PromptEncoder(chat_tokenizer, CHAT, length - 1).encode(problem) is None


def test_a_task_of_which_one_prompt_fits_is_usable(tokenizer):
    task = Sorting(min_letters=3, max_letters=6, train_size=20, held_out_size=1)
    PromptEncoder(tokenizer, PLAIN, 4).check_usable(task)


def test_a_task_of_which_no_prompt_fits_names_the_limit(tokenizer):
    task = Sorting(train_size=20, held_out_size=1)
    with pytest.raises(TaskError, match=r"^rollout\.max_prompt_tokens: none of the 20 prompts .* 3 tokens"):
        PromptEncoder(tokenizer, PLAIN, 3).check_usable(task)


def test_a_task_without_problems_names_the_task(tokenizer):
    with pytest.raises(TaskError, match=r"^task\.target: "):
        PromptEncoder(tokenizer, PLAIN, 3).check_usable(NoProblems())
