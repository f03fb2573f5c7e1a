"""Count the steps that each loss needs, at several policy ages: `python scripts/compare_losses.py [--losses NAME ...]`.

Every run is the real loop with its actors in one process, with the config of `grpo train` for the same overrides. It
ends with the first evaluation at the target. After an interruption the same command continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from comparison.runs import begin_worker, make_run
from comparison.table import Record, Setting, cell, on_screen, page, rows
from rich.console import Console

from grpo.algorithms.losses import LOSSES
from grpo.cli import preflight
from grpo.config.composition import CONFIGS, compose
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError, GRPOError
from grpo.observe.run_dir import to_json
from grpo.types import EXIT_CODES

FIXED = ["checkpoint.every=0", "trainer.snapshot_every=0", "eval.every=5", "eval.replicas=0", "reward.workers=1"]
VARIED = {"loss", "correction", "seed", "buffer.max_policy_age", "rollout.concurrency"}
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """Yield all settings, seed by seed: an interrupted comparison has some runs of every loss."""
    for seed in args.seeds:
        for loss in args.losses:
            for age in args.ages:
                for correction in ["none", *args.correction] if age else ["none"]:  # no age, nothing to correct
                    yield Setting(loss, correction, age, seed)


def config_of(setting: Setting, overrides: Sequence[str]) -> RunConfig:
    return replace(_composed(setting.loss, setting.correction, setting.age, tuple(overrides)), seed=setting.seed)


@cache  # it takes a tenth of a second
def _composed(loss: str, correction: str, age: int, overrides: tuple[str, ...]) -> RunConfig:
    """Return the config of `grpo train` with as many rollouts as tickets: fewer would keep the ages down."""
    groups = [f"loss={loss}", f"correction={correction}"]
    config = compose(*groups, f"buffer.max_policy_age={age}", *FIXED, *overrides)
    config.rollout.concurrency = config.ticket_capacity
    return config


def names(group: str) -> list[str]:
    """Return the options of a Hydra group."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


class Results:
    """Runs in a JSON file, by a hash of the whole config: after a change of a default they are run again."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and ConfigError where the file holds something else."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else '{"runs": []}'
        try:
            self._runs: dict[str, Record] = {record["key"]: record for record in json.loads(text)["runs"]}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} holds no comparison", key="--json") from None

    def get(self, key: str) -> Record | None:
        return self._runs.get(key)

    def is_made(self, key: str) -> bool:
        """Return True for a run that completed; a failed run is repeated."""
        return key in self._runs and self._runs[key]["error"] is None

    def add(self, record: Record) -> None:
        self._runs[record["key"]] = record
        write(self._path, to_json({"runs": list(self._runs.values())}, indent=1) + "\n")


def key_of(config: RunConfig, target: float) -> str:
    return sha256(json.dumps([target, asdict(config)], sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """Write atomically: the old file may be the work of hours."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_runs(todo: Mapping[Setting, RunConfig], args: argparse.Namespace, results: Results, console: Console) -> None:
    """Make the runs, `args.jobs` at a time, and add each to the file as soon as it has ended.

    After an interruption the runs under way finish their current step and close their actors; they are not recorded.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(args.jobs, context, begin_worker, (stop,)) as pool:
        try:
            with _ctrl_c_held():
                futures = {pool.submit(make_run, config, args.target): setting for setting, config in todo.items()}
            for count, future in enumerate(as_completed(futures), start=1):
                setting = futures[future]
                config = todo[setting]
                record = {"key": key_of(config, args.target), **asdict(setting), "target": args.target}
                record |= {"overrides": args.overrides, "max_steps": config.trainer.max_steps, **future.result()}
                results.add(record)
                console.print(f"{count}/{len(todo)}  {setting}: {record['error'] or cell([record])}", **PLAIN)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Hold back the SIGINT of a terminal: new processes never get it, this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(command: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", metavar="NAME", default=sorted(LOSSES), choices=sorted(LOSSES))
    parser.add_argument("--ages", nargs="+", metavar="S", type=int, default=[0, 1, 4, 8], help="buffer.max_policy_age")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--correction", nargs="*", metavar="NAME", default=["decoupled"], help="besides none, at ages above 0"
    )
    parser.add_argument("--target", type=float, default=0.9, help="held-out reward at which a run has made it")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at a time, one process each")
    parser.add_argument("--out", type=Path, default=Path("losses.md"), help="the table, in Markdown")
    parser.add_argument(
        "--json", type=Path, help="every single run (default: beside --out); those in it are not made again"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, for every run")
    overrides = [word for word in command if "=" in word and not word.startswith("-")]  # wherever they stand
    args = parser.parse_args([*(word for word in command if word not in overrides), "--", *overrides])
    args.json = args.json or args.out.with_suffix(".json")
    args.correction = [name for name in dict.fromkeys(args.correction) if name != "none"]
    if unknown := [name for name in args.correction if name not in names("correction")]:
        parser.error(f"argument --correction: {unknown[0]!r} is not one of {', '.join(names('correction')) or 'none'}")
    if args.jobs < 1:
        parser.error("argument --jobs: at least one run has to go on")
    if own := [word for word in overrides if word.lstrip("+").partition("=")[0] in VARIED]:
        parser.error(f"{own[0]}: the comparison sets this itself")
    return args, parser


def configs_of(args: argparse.Namespace) -> dict[Setting, RunConfig]:
    """Every run of the comparison, checked, and the model that they begin with made. Raises GRPOError, OSError."""
    configs = {setting: config_of(setting, args.overrides) for setting in settings(args)}
    for config in {setting.loss: config for setting, config in configs.items()}.values():
        preflight.prepare_model(config, preflight.check_names(config))
    return configs


def main(command: Sequence[str]) -> int:
    args, parser = parse(command)
    console = Console()
    try:
        configs, results = configs_of(args), Results(args.json)
    except (GRPOError, OSError) as error:
        parser.error(str(error))
    keys = {setting: key_of(config, args.target) for setting, config in configs.items()}
    todo = {setting: config for setting, config in configs.items() if not results.is_made(keys[setting])}
    console.print(f"{len(todo)} of {len(configs)} runs to make", **PLAIN)
    try:
        make_runs(todo, args, results, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on with the runs in {args.json}", **PLAIN)
        return EXIT_CODES["interrupted"]
    except BrokenProcessPool:
        print(f"error: the process of a run was killed; the same command goes on from {args.json}", file=sys.stderr)
        return EXIT_CODES["failed"]
    found = {setting: record for setting, key in keys.items() if (record := results.get(key)) is not None}
    table, title = rows(configs, found), title_of(args)
    console.print(title, on_screen(table), sep="\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    how = f"python scripts/compare_losses.py {shlex.join(command)}".strip()
    write(args.out, page(table, title, how, f"{cores()} cores, {args.jobs} runs side by side"))
    console.print(f"{args.out}, {args.json}", **PLAIN)
    return EXIT_CODES["completed"]


def title_of(args: argparse.Namespace) -> str:
    seeds = f"median of {len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed"
    return f"Train steps (seconds) until the held-out reward reaches {args.target:g}, {seeds}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
