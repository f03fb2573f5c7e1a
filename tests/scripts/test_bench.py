"""Figures and their targets."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

pytestmark = pytest.mark.long

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield __import__("benchmarks.figures", fromlist=["figures"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_figure_reaches_its_target_or_misses_it(figures):
    figure = figures.Figure
    assert figure("a", "b", 1.0).reached is None
    assert [figure("a", "b", value, at_least=0.9).reached for value in (0.8, 0.9)] == [False, True]
    assert [figure("a", "b", value, at_most=3.0).reached for value in (3.0, 3.1)] == [True, False]


def test_they_are_shown_and_saved_with_the_machine(figures, tmp_path):
    made = [figures.Figure("weights", "pause", 1.8, at_most=1.3), figures.Figure("weights", "a copy", 9.5, "GB/s")]
    figures.print_figures(made, console := Console(file=io.StringIO(), width=80))
    shown = console.file.getvalue()
    assert "missed" in shown
    assert "9.5 GB/s" in shown
    figures.save_figures("weights", made, {"quick": True}, tmp_path / "bench.json")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["machine"]["cores"] >= 1
    assert [figure["reached"] for figure in record["benches"]["weights"]["figures"]] == [False, None]


def test_a_file_keeps_the_last_figures_of_every_benchmark(figures, tmp_path):
    file = tmp_path / "bench.json"
    for bench, value in (("weights", 1.8), ("startup", 14.0), ("weights", 1.2)):
        figures.save_figures(bench, [figures.Figure(bench, "a figure", value, at_most=1.3)], {}, file)
    table = figures.markdown(file).splitlines()
    assert table[2:] == [
        "| | measured | target | |",
        "|---|---|---|---|",
        "| **weights** | | | |",
        "| a figure | 1.2 | ≤ 1.3 | reached |",
        "| **startup** | | | |",
        "| a figure | 14 | ≤ 1.3 | **missed** |",
    ]


def test_figures_of_another_machine_are_not_mixed_in(figures, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"machine": {"cores": 999}, "benches": {}}))
    with pytest.raises(SystemExit, match="another machine"):
        figures.save_figures("weights", [], {}, file)
