"""Figures and their targets."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

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
    figures.save_figures(made, {"quick": True}, tmp_path / "bench.json")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["machine"]["cores"] >= 1
    assert [figure["reached"] for figure in record["figures"]] == [False, None]
