"""`scripts/report.py` as it is typed: the page, or one line that says what is wrong."""

import runpy
import sys

import pytest

from tests.report.made_runs import make_run


@pytest.fixture
def report(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        runpy.run_path("scripts/report.py", run_name="__main__")
        return capsys.readouterr().out.strip()

    return run


def test_the_page_stands_in_the_folder_of_the_run(report, tmp_path):
    assert report(make_run(tmp_path / "a")) == str(tmp_path / "a" / "report.html")
    assert report(tmp_path / "a", "--out", tmp_path / "b.html", "--from", 0.002) == str(tmp_path / "b.html")
    make_run(tmp_path / "b", concurrency=8)
    assert report(tmp_path / "a", tmp_path / "b") == str(tmp_path / "comparison.html")


@pytest.mark.parametrize("arguments", [["missing"], ["."], ["a", "--out", "missing/b.html"]])
def test_what_is_wrong_is_one_line(report, arguments, tmp_path):
    make_run(tmp_path / "a")
    with pytest.raises(SystemExit) as ended:
        report(*(each if each.startswith("--") else tmp_path / each for each in arguments))
    assert str(ended.value).startswith("error: ")
    assert "\n" not in str(ended.value)
