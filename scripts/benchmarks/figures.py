"""A measured number beside what it has to reach; tables and JSON of them."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """`at_least` and `at_most` are the target, where there is one. A figure is a ratio of two things of one run, or
    says with its unit what it is."""

    bench: str
    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """None without a target."""
        if self.at_least is None and self.at_most is None:
            return None
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def shown(self) -> str:
        return f"{self.value:.4g} {self.unit}".strip()

    @property
    def target(self) -> str:
        bounds = {"≥": self.at_least, "≤": self.at_most}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    return {
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20) if memory else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "transformers")},
    }


def print_figures(figures: Iterable[Figure], console: Console) -> None:
    table = Table("", "", "target", "", box=None)
    table.columns[1].justify = "right"
    bench = ""
    for figure in figures:
        if figure.bench != bench:
            bench = figure.bench
            table.add_row(f"[bold]{bench}")
        mark = {True: "[green]reached", False: "[red]missed", None: ""}[figure.reached]
        table.add_row(f"  {figure.name}", figure.shown, figure.target, mark)
    console.print(table)


def save_figures(bench: str, figures: Iterable[Figure], about: Mapping[str, Any], file: Path) -> None:
    """As JSON, with the machine; the file keeps the last figures of other benchmarks."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"machine": machine(), "benches": {}}
    if record["machine"] != machine():
        raise SystemExit(f"{file} has figures of another machine, or of other versions; name another file with --out")
    record["benches"][bench] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        "figures": [asdict(figure) | {"reached": figure.reached} for figure in figures],
    }
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(file: Path) -> str:
    """The figures of a file as a table, those with a target in one column more than the others."""
    record = json.loads(file.read_text(encoding="utf-8"))
    lines = ["| | measured | target | |", "|---|---|---|---|"]
    for bench, saved in record["benches"].items():
        lines.append(f"| **{bench}** | | | |")
        for fields in saved["figures"]:
            figure = Figure(**{name: value for name, value in fields.items() if name != "reached"})
            mark = {True: "reached", False: "**missed**", None: ""}[figure.reached]
            lines.append(f"| {figure.name} | {figure.shown} | {figure.target} | {mark} |")
    return "\n".join([_sentence(record["machine"]), "", *lines])


def _sentence(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", "ray", "torch", "transformers"))
    return f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; {versions}."
