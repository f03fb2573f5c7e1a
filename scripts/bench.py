"""Measure the framework against physical limits and against what one would use instead.

    python scripts/bench.py orchestration            one benchmark, or several
    python scripts/bench.py all --quick              shorter and rougher: about a minute each, two for peer
    python scripts/bench.py --markdown               the table of the last measurements

Prints a table of figures with their targets, and keeps the last ones of every benchmark as JSON. Nothing else should
run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from benchmarks.figures import Figure, machine, markdown, print_figures, save_figures
from rich.console import Console

BENCHES = ("orchestration", "weights", "engine", "episodes", "learner", "overlap", "startup", "peer", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=", ".join((*BENCHES, "all")))
    parser.add_argument("--quick", action="store_true", help="shorter and rougher")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="the figures (bench.json)")
    parser.add_argument("--markdown", action="store_true", help="at the end, print that file as Markdown")
    args = parser.parse_args()
    if unknown := set(args.benches) - {*BENCHES, "all"}:
        parser.error(f"there is no {' and no '.join(sorted(unknown))}, but {', '.join(BENCHES)} and all")
    if not args.benches and not (args.markdown and args.out.exists()):
        parser.error(f"name a benchmark, or --markdown with figures in {args.out}")
    names = BENCHES if "all" in args.benches else args.benches
    console = Console(soft_wrap=True, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    figures: list[Figure] = []
    for name in names:
        bench = importlib.import_module(f"benchmarks.{name}")
        console.print(f"{name}: {str(bench.__doc__).partition(chr(10))[0]}", style="dim")
        began = time.perf_counter()
        found = bench.run(args.quick)
        took_s = round(time.perf_counter() - began)
        console.print(f"{name} took {took_s} s", style="dim")
        if found:
            save_figures(name, found, {"quick": args.quick, "took_s": took_s}, args.out)
        figures += found
    print_figures(figures, console)
    if args.markdown:
        print(markdown(args.out))


if __name__ == "__main__":
    main()
