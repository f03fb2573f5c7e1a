"""Make a page of a run, or of several side by side: `python scripts/report.py RUN_FOLDER [RUN_FOLDER ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo.report.page import write_report
from grpo.types import ReportError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; several are compared")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run's folder)")
    parser.add_argument("--from", dest="from_s", type=float, default=0.0, help="second at which its timeline begins")
    args = parser.parse_args()
    try:
        print(write_report(args.runs, args.out, from_s=args.from_s))
    except ReportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
