"""Make a page of a run, or of several side by side: `grpo report RUN_FOLDER [RUN_FOLDER ...]`."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import NoReturn

from grpo.cli.main import ArgumentParser
from grpo.errors import ReportError
from grpo.report.page import named_runs, write_report
from grpo.report.serve import LiveRun, ReportServer
from grpo.report.sweep import print_table
from grpo.types import EXIT_CODES


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, as in --from 12.5")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, a number from 0 (any that is free) to 65535")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or a sweep's; several are compared")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run's folder)")
    parser.add_argument(
        "--from", dest="from_s", type=_seconds, default=0.0, metavar="SECONDS", help="where its timeline begins"
    )
    parser.add_argument("--serve", action="store_true", help="show a run while it goes on; Ctrl-C ends it")
    parser.add_argument("--port", type=_port, default=8010, help="of --serve (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="of --serve; 0.0.0.0 lets other machines in")
    return parser.parse_args()


def _serve(args: argparse.Namespace) -> NoReturn:
    # A shell starts background jobs with SIGINT ignored; the server must be stoppable there too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(args.runs) > 1:
        raise ReportError("--serve shows one run; name one folder")
    with ReportServer(LiveRun(args.runs[0], args.from_s), args.host, args.port) as server:
        print(f"{args.runs[0]} is shown at {server.url}; Ctrl-C ends it", flush=True)
        server.serve_forever()
    raise AssertionError("it serves until it is interrupted")


def main() -> None:
    """Make the page, or serve it while the run goes on, and exit."""
    args = _arguments()
    try:
        if args.serve:
            _serve(args)
        runs = named_runs(args.runs)
        if len(runs) > 1:
            print_table(runs)
        print(write_report(runs, args.out, from_s=args.from_s))
    except ReportError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["interrupted"])
