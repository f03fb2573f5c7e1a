import logging
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_script(tmp_path, tiny_model_path):
    """Type `python scripts/SCRIPT ...` in an empty folder, with a random tiny model; gives the process.

    Checkpoints, evaluations and reports are made only where a test asks for them: they cost seconds on two cores.
    """

    def start(script, *overrides, model=None):
        args = ["model=hf", f"model.path={tiny_model_path}"] if model is None else model
        for costly in ("checkpoint.every=0", "observe.report=false", "eval.prompts=0"):
            if script == "train.py" and not any(costly.partition("=")[0] in override for override in overrides):
                args = [*args, costly]
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
def train(run_script):
    return partial(run_script, "train.py")


@pytest.fixture
def evaluate(run_script):
    return partial(run_script, "evaluate.py")


@pytest.fixture
def type_in(tmp_path, tiny_model_path, monkeypatch, capsys):
    """As `run_script`, in this process: for what ends before Ray starts. Gives (exit code, stdout, stderr).

    A process of its own would take seconds to import torch.
    """

    def type_in(script, *words, model=None):
        args = ["model=hf", f"model.path={tiny_model_path}"] if model is None else model
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / script), *words, *args])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        before = logging.root.handlers[:], logging.root.level
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        for handler in logging.root.handlers:
            if handler not in before[0]:
                handler.close()
        logging.root.handlers[:], logging.root.level = before
        stdout, stderr = capsys.readouterr()
        code = ended.value.code
        return (1, stdout, f"{stderr}{code}\n") if isinstance(code, str) else (code, stdout, stderr)  # as Python does

    return type_in
