"""The `grpo` command: `grpo train +experiment=gsm8k`, `grpo report RUN_FOLDER`, and so on.

Each command is a function that reads `sys.argv` as if it were a program of its own; `python scripts/train.py ...` is
the same as `grpo train ...`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

import grpo

COMMANDS = {
    "train": "grpo.cli.hydra_jobs:train",
    "evaluate": "grpo.cli.hydra_jobs:evaluate",
    "export": "grpo.cli.export:main",
    "report": "grpo.cli.report:main",
    "scale": "grpo.cli.scale:main",
    "tune": "grpo.cli.tune:main",
}
USAGE = """usage: grpo COMMAND ...

  train      train a model: grpo train [+experiment=NAME] [key=value ...]
  evaluate   answer held-out prompts with a model: grpo evaluate [model=NAME] [task=NAME] [key=value ...]
  export     make an ordinary Hugging Face folder of a checkpoint
  report     make a page of a run, or of several side by side; --serve follows a run
  scale      look at the replicas of a running run, or scale them
  tune       find the smallest policy age and concurrency that keep the trainer busy

`grpo COMMAND --help` tells more."""


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; --help tells more")


def main() -> None:
    """Run the command that the first argument names. Every mistake is one line on stderr."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if sys.argv[1] in ("-V", "--version"):
        print(f"grpo {grpo.__version__}")
        return
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        sys.exit(f"error: no command {name!r}; there are {', '.join(COMMANDS)}")
    sys.argv[0] = f"grpo {name}"  # the program's name in its own help
    module, _, function = COMMANDS[name].partition(":")
    getattr(importlib.import_module(module), function)()


def print_warning(line: str) -> None:
    """Print a warning about the command line on stderr."""
    print(f"warning: {line}", file=sys.stderr)
