"""Look at the replicas of a running run, or scale them: `grpo scale RUN_FOLDER [generator=3 ...]`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo.cli.main import ArgumentParser
from grpo.errors import ControlError
from grpo.services.control import SCALABLE, ask


def _service(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if name not in SCALABLE or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(SCALABLE)}, as in generator=3")
    return name, int(count)


def main() -> None:
    """Scale what the command line names, print the replicas, and exit."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("services", nargs="*", type=_service, help="how many replicas of what: generator=3")
    args = parser.parse_args()
    try:
        replicas = asyncio.run(ask(args.run, dict(args.services)))
    except ControlError as error:
        sys.exit(f"error: {error}")
    table = Table("replica", "state", "requests", "failures", "in flight", "seconds each")
    for name, stats in replicas.items():
        latency = "" if stats["latency_s"] is None else f"{stats['latency_s']:.3f}"
        counts = (str(stats[key]) for key in ("requests", "failures", "in_flight"))
        table.add_row(name, stats["state"], *counts, latency)
    Console().print(table)
