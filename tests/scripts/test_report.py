"""`scripts/report.py` as it is typed: the page, or one line that says what is wrong."""

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.made_runs import make_failed_run, make_run


@pytest.fixture
def report(monkeypatch, capsys):
    def run(*arguments, script=Path("scripts/report.py")):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out.strip()

    return run


@pytest.fixture
def compare(report):
    """As `report`, of several runs: gives the rows of the table, as words, and the path of the page."""

    def run(*arguments):
        *table, path = report(*arguments).splitlines()
        return [line.split() for line in table if line.strip() and "─" not in line][2:], path

    return run


def test_the_page_stands_in_the_folder_of_the_run(report, tmp_path):
    assert report(make_run(tmp_path / "a")) == str(tmp_path / "a" / "report.html")
    assert report(tmp_path / "a", "--out", tmp_path / "b.html", "--from", 0.002) == str(tmp_path / "b.html")
    make_run(tmp_path / "b", concurrency=8)


def test_several_runs_are_compared_in_a_table_and_a_page(compare, tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", concurrency=8, summary=False)]
    (a, b), path = compare(*folders)
    assert path == str(tmp_path / "comparison.html")
    assert a == ["a", "4", "failed", "12", "0.05->0.60", "0.30->0.90", "0.70", "25%", "400"]
    assert b[:4] == ["b", "8", "no", "summary"]


def test_a_folder_of_a_sweep_stands_for_its_runs(compare, tmp_path):
    sweep = tmp_path / "sweep"
    for place, concurrency in enumerate((16, 4)):
        make_run(
            sweep / str(place),
            concurrency=concurrency,
            timeline=False,
            overrides=[f"rollout.concurrency={concurrency}", "seed=0"],
        )
    make_failed_run(sweep / "2", overrides=["rollout.concurrency=0", "seed=0"])
    (sweep / "multirun.yaml").write_text("")
    rows, path = compare(sweep)
    assert path == str(sweep / "comparison.html")
    assert [row[:4] for row in rows] == [
        ["2", "0", "failed", "0"],
        ["1", "4", "failed", "12"],
        ["0", "16", "failed", "12"],
    ]
    assert compare(*sorted(sweep.iterdir())) == (rows, path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "runs; --help"),
        ("missing", "no such folder; name the folder of a run, as in"),
        ("a/summary.json", "is a file; name the folder of a run"),
        ("empty", "holds no metrics.jsonl"),
        ("starting", "no step was trained yet; --serve waits for the first"),
        ("a --out missing/b.html", "can't write"),
        ("a --from soon", "'soon' is no number of seconds, as in --from 12.5"),
        ("a --from nan", "'nan' is no number"),
        ("a --serve --port many", "'many' is no port"),
        ("a starting --serve", "--serve shows one run; name one folder"),
        ("empty --serve", "holds no metrics.jsonl"),
    ],
)
def test_what_is_wrong_is_one_line(report, monkeypatch, arguments, said, tmp_path):
    make_run(tmp_path / "a")
    make_failed_run(tmp_path / "starting", ())
    (tmp_path / "empty").mkdir()
    script = Path("scripts/report.py").resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        report(*arguments.split(), script=script)
    assert str(ended.value).startswith("error: ")
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)


def test_serving_ends_with_ctrl_c(tmp_path):
    folder = make_run(tmp_path / "a")
    command = [sys.executable, "scripts/report.py", str(folder), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        assert re.fullmatch(rf"{folder} is shown at http://127\.0\.0\.1:\d+/; Ctrl-C ends it\n", said)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) == ("", "")
    assert process.returncode == 130
