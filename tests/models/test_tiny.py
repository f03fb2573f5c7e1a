from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from grpo.models import tiny
from grpo.models.loading import cache_folder
from grpo.models.tiny import character_tokenizer, prepare, tiny_llama
from grpo.tasks.guess import Guess
from grpo.tasks.sorting import Sorting
from grpo.types import Problem

QUICK = {"steps": 2, "batch_size": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def task():
    return Sorting(train_size=20, held_out_size=2)


@pytest.mark.parametrize("text", ["dbca>abcd", "What is 4 + 7?", "(a, b) . c : d#<=>", "  two  spaces ", ""])
def test_text_survives_the_tokenizer(text):
    tokenizer = character_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text


def test_text_survives_a_tokenizer_that_was_saved(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("(a, b) . c?")) == "(a, b) . c?"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_an_unknown_character_is_one_unknown_token():
    assert character_tokenizer().encode("aéb") == [3, 2, 4]


def test_the_tokenizer_fits_the_model():
    model = tiny_llama(width=32, layers=1, heads=2)
    assert len(character_tokenizer()) == model.config.vocab_size


def test_the_initial_weights_follow_from_the_seed_and_leave_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (tiny_llama(width=32, layers=1, heads=2, seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_two_fresh_preparations_give_identical_weights(cache, task, monkeypatch):
    folders = []
    for name in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / name))
        torch.manual_seed(len(folders))  # whatever the process did before
        folders.append(prepare(task, **QUICK))
    assert folders[0] != folders[1]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], tiny_llama().model.norm.weight), "it was not trained"


def test_the_second_call_finds_the_first_ones_folder(task, monkeypatch):
    folder = prepare(task, **QUICK)
    assert folder.parent == cache_folder()
    monkeypatch.setattr(tiny, "_warm_start", None)  # calling it would raise
    assert prepare(Sorting(train_size=20, held_out_size=2), **QUICK) == folder


def test_other_settings_or_prompts_get_another_folder(task, monkeypatch):
    monkeypatch.setattr(tiny, "_warm_start", lambda *args, **kwargs: None)
    other_task = Sorting(train_size=20, held_out_size=2, seed=1)
    folders = [
        prepare(task, **QUICK),
        prepare(task, **QUICK | {"steps": 3}),
        prepare(task, **QUICK | {"batch_size": 5}),
        prepare(task, **QUICK, lr=1e-3),
        prepare(other_task, **QUICK),
    ]
    assert len(set(folders)) == 5
    assert sorted(cache_folder().iterdir()) == sorted(folders), "nothing unfinished is left behind"


def test_a_warm_start_that_fails_leaves_nothing_behind(task, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "_warm_start", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(task, **QUICK)
    assert list(cache_folder().iterdir()) == []


def test_of_two_that_prepare_at_once_the_first_wins(task, monkeypatch):
    """The other process finishes while this one is still at its warm start."""
    real, theirs = tiny._warm_start, []

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(tiny, "_warm_start", real)
        theirs.append(prepare(task, **QUICK))

    monkeypatch.setattr(tiny, "_warm_start", overtaken)
    ours = prepare(task, **QUICK)
    assert [ours] == theirs == list(cache_folder().iterdir())
    assert not torch.equal(load_file(ours / "model.safetensors")["model.norm.weight"], torch.ones(128))


def test_examples_are_trained_on_the_answer_and_its_eos_alone(task):
    tokenizer = character_tokenizer()
    problems = task.problems("train")[:5]
    tokens_BT, labels_BT = tiny._examples(problems, tokenizer, task, tiny.np.random.default_rng(0))
    for problem, tokens_T, labels_T in zip(problems, tokens_BT, labels_BT, strict=True):
        trained_T = labels_T != -100
        assert torch.equal(tokens_T[trained_T], labels_T[trained_T])
        assert tokenizer.decode(tokens_T, skip_special_tokens=True).startswith(problem.question)
        answer = tokenizer.decode(labels_T[trained_T])
        assert answer.endswith("<eos>")
        assert sorted(answer.removesuffix("<eos>")) == sorted(problem.answer)


def test_an_episode_is_trained_on_its_turns_and_not_on_the_replies():
    class Game:
        def demonstration(self, problem, rng):
            return ["12", "<", "7", ">>", "9"]

    tokenizer = character_tokenizer()
    problems = [Problem("23:", "9"), Problem("1234567:", "9")]
    tokens_BT, labels_BT = tiny._examples(problems, tokenizer, Game(), tiny.np.random.default_rng(0))
    for problem, tokens_T, labels_T in zip(problems, tokens_BT, labels_BT, strict=True):
        assert tokenizer.decode(tokens_T[tokens_T != 0]) == f"{problem.question}12<eos><7<eos>>>9<eos>"
        trained_T = labels_T != -100
        assert torch.equal(tokens_T[trained_T], labels_T[trained_T])
        assert tokenizer.decode(labels_T[trained_T]) == "12<eos>7<eos>9<eos>"


def test_a_task_of_several_turns_can_be_demonstrated():
    folder = prepare(Guess(min_numbers=2, max_numbers=5), **QUICK)
    assert folder.name.startswith("tiny-guess-")
    assert not torch.equal(load_file(folder / "model.safetensors")["model.norm.weight"], torch.ones(128))
