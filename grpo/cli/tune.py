"""Find the smallest policy age and rollout concurrency that keep the trainer from waiting.

    grpo tune +experiment=tiny                   measured: a short run of train for each setting tried
    grpo tune --simulate RUN [--simulate RUN]    simulated with what the timelines of these runs say
    grpo tune --simulate RUN generator.replicas=8 --trainer-speed 20     the same on other machines
    grpo tune --simulate RUN --against OTHER     how far the simulation is from another run

Overrides are those of train; with --simulate they change the config of the first run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo.cli.main import ArgumentParser, print_warning
from grpo.config.composition import compose, from_run
from grpo.config.schema import RunConfig
from grpo.errors import GRPOError
from grpo.tuning.fitting import profile_of
from grpo.tuning.profile import Lengths, Profile, load_profile, parse_lengths
from grpo.tuning.search import WARM_UP_STEPS, Found, Outcome, Setting, ShortRuns, outcome_of, read_metrics, search
from grpo.types import EXIT_CODES

MOST_STEPS = 150  # a policy that has learned much makes other groups than one that has not
Measure = Callable[[Setting], Outcome]


def main() -> None:
    """Search, or compare the simulation with real runs, print what was found, and exit."""
    args = _arguments()
    console = Console(soft_wrap=True, highlight=False)
    try:
        enough = _compare(args, console) if args.against else _tune(args, console)
    except GRPOError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["interrupted"])
    sys.exit(0 if enough else 1)


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for train")
    parser.add_argument("--target", type=_share, default=0.1, help="share of its time that the trainer may wait (0.1)")
    parser.add_argument("--ages", type=_ages, default=(0, 1, 2, 4), help="policy ages to try, in order (0,1,2,4)")
    parser.add_argument("--steps", type=_steps, help=f"of each run (trainer.max_steps, at most {MOST_STEPS})")
    parser.add_argument("--out", type=Path, help="folder of the short runs (default: outputs/tune/DATE/TIME)")
    simulated = parser.add_argument_group("simulated")
    simulated.add_argument(
        "--simulate", type=Path, action="append", metavar="RUN", help="a run's folder, or a file made by --save-profile"
    )
    simulated.add_argument("--against", type=Path, action="append", metavar="RUN", help="compare with what it was like")
    simulated.add_argument("--save-profile", type=Path, metavar="FILE", help="write what was read from the timelines")
    for who in ("generator", "trainer", "reward"):
        simulated.add_argument(f"--{who}-speed", type=_speed, default=1.0, metavar="X", help="so many times as fast")
    simulated.add_argument(
        "--lengths",
        type=_lengths,
        metavar="KIND",
        help="of completions: fixed:N, geometric:MEAN, lognormal:MEDIAN,SIGMA",
    )
    args = parser.parse_intermixed_args()
    if not args.simulate and (args.save_profile or args.lengths or args.against):
        parser.error("--save-profile, --lengths and --against go with --simulate")
    return args


def _tune(args: argparse.Namespace, console: Console) -> bool:
    """Return True if a setting was found that keeps the trainer busy enough."""
    config, measure = _simulating(args, console) if args.simulate else _running(args, console)

    def measure_and_tell(setting: Setting) -> Outcome:
        outcome = measure(setting)
        console.print(f"  age {setting.max_policy_age}, {setting.concurrency:>4} rollouts: {_words(outcome)}")
        return outcome

    found = search(measure_and_tell, config.trainer.groups_per_step, args.ages, args.target)
    _print_found(found, args.target, console)
    return found.enough


def _simulating(args: argparse.Namespace, console: Console) -> tuple[RunConfig, Measure]:
    profile, config = _profile(args)
    steps = _steps_of(config, args)
    console.print(f"simulating {steps} steps for each setting, from {', '.join(map(str, args.simulate))}")
    return config, lambda setting: _simulated(profile, _with(config, setting), steps)


def _running(args: argparse.Namespace, console: Console) -> tuple[RunConfig, Measure]:
    config = compose(*args.overrides, warn=print_warning)
    folder = args.out or Path("outputs") / "tune" / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    steps = _steps_of(config, args)
    console.print(f"a run of {steps} steps for each setting, in {folder}; target: {args.target:.0%} wait")
    return config, ShortRuns(args.overrides, steps, folder.absolute()).measure


def _steps_of(config: RunConfig, args: argparse.Namespace) -> int:
    steps: int = args.steps or min(config.trainer.max_steps, MOST_STEPS)
    return steps


def _compare(args: argparse.Namespace, console: Console) -> bool:
    profile, _ = _profile(args)
    table = Table("age", "rollouts", "steps/s", "simulated", "ratio", "waits", "simulated", "run", box=None)
    for run in args.against:
        config, lines = from_run(run, warn=print_warning), read_metrics(run)
        real, simulated = outcome_of(lines), _simulated(profile, config, len(lines))
        table.add_row(
            str(config.buffer.max_policy_age),
            str(config.rollout.concurrency),
            f"{real.steps_per_s:.3g}",
            f"{simulated.steps_per_s:.3g}",
            f"{simulated.steps_per_s / real.steps_per_s:.2f}",
            f"{real.trainer_wait:.0%}",
            f"{simulated.trainer_wait:.0%}",
            run.name,
        )
    console.print(table)
    return True


def _simulated(profile: Profile, config: RunConfig, steps: int) -> Outcome:
    from grpo.tuning.simulation import simulate  # imports torch: an error in the arguments should not wait for it

    return simulate(profile, config, steps)


def _profile(args: argparse.Namespace) -> tuple[Profile, RunConfig]:
    first = args.simulate[0]
    if first.is_file():
        profile, config = load_profile(first), compose(*args.overrides, warn=print_warning)
    else:
        config = from_run(first, args.overrides, warn=print_warning)
        profile = profile_of(args.simulate)
    if args.save_profile:
        profile.save(args.save_profile)
    profile = profile.scaled(generator=args.generator_speed, trainer=args.trainer_speed, reward=args.reward_speed)
    if args.lengths:
        profile = profile.with_lengths(args.lengths, config.rollout.max_completion_tokens)
    return profile, config


def _with(config: RunConfig, setting: Setting) -> RunConfig:
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, concurrency=setting.concurrency),
        buffer=dataclasses.replace(config.buffer, max_policy_age=setting.max_policy_age),
    )


def _print_found(found: Found, target: float, console: Console) -> None:
    setting, outcome = found.setting, found.outcome
    if found.enough:
        console.print(f"[bold]{setting}[/]  {_words(outcome)}")
        return
    console.print(f"the trainer never waits for less than {target:.0%}; least with {setting}: {_words(outcome)}")
    if outcome.generator_busy > 0.8:
        times = (1 - target) / (1 - outcome.trainer_wait)
        console.print(f"the generators have no time left: it takes {times:.1f} times as many (generator.replicas)")


def _words(outcome: Outcome) -> str:
    return (
        f"trainer waits {outcome.trainer_wait:4.0%}, {outcome.steps_per_s:.3g} steps/s, "
        f"generators busy {outcome.generator_busy:4.0%}, age {outcome.policy_age:.2f}"
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _ages(text: str) -> tuple[int, ...]:
    ages = tuple(int(age) for age in text.split(","))
    if min(ages) < 0:
        raise argparse.ArgumentTypeError("ages are not negative")
    return ages


def _steps(text: str) -> int:
    if int(text) <= WARM_UP_STEPS:
        raise argparse.ArgumentTypeError(f"{text} is too few: the first {WARM_UP_STEPS} don't count")
    return int(text)


def _lengths(text: str) -> Lengths:
    try:
        return parse_lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _speed(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)
