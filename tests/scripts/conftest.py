import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path, tiny_model_path):
    """Type `python scripts/SCRIPT ...` in an empty folder, with a random tiny model; gives the process.

    Checkpoints are written only where a test asks for them: their process costs seconds on two cores.
    """

    def start(script, *overrides, model=None):
        args = ["model=hf", f"model.path={tiny_model_path}"] if model is None else model
        if script == "train.py" and not any("checkpoint.every" in override for override in overrides):
            args = [*args, "checkpoint.every=0"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / script), *overrides, *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def train(start):
    return partial(start, "train.py")


@pytest.fixture
def evaluate(start):
    return partial(start, "evaluate.py")
