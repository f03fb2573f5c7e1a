from __future__ import annotations

import os
from pathlib import Path

import pytest

from grpo.models.loading import cache_folder, cached


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def write(text):
    return lambda folder: (folder / "config.json").write_text(text)


def test_a_model_is_made_once():
    folder = cached("m", write("first"))
    assert cached("m", write("second")) == folder == cache_folder() / "m"
    assert (folder / "config.json").read_text() == "first"
    assert cached("other", write("second")) != folder


def test_one_that_fails_leaves_nothing_behind():
    def fail(folder):
        write("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("m", fail)
    assert list(cache_folder().iterdir()) == []


def test_of_two_at_once_the_first_wins():
    def overtaken(folder):
        cached("m", write("theirs"))
        write("ours")(folder)

    folder = cached("m", overtaken)
    assert (folder / "config.json").read_text() == "theirs"
    assert list(cache_folder().iterdir()) == [folder]


def test_a_folder_that_cannot_be_put_in_place_is_an_error():
    def vanishing(folder):
        folder.rmdir()

    with pytest.raises(FileNotFoundError):
        cached("m", vanishing)


def test_without_xdg_the_cache_lies_in_the_home_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(os.path.expanduser("~")) / ".cache" / "grpo"
