"""An ordinary `pip install` brings all that training needs: the commands, the settings, the report's page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed the package, of a copy: building leaves folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("grpo", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.mark.long
def test_it_trains_from_an_empty_folder(installed, tiny_model_path, tmp_path):
    small = ["trainer.max_steps=2", "eval.prompts=0", "checkpoint.every=0", "model=hf", f"model.path={tiny_model_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "grpo.cli", "train", *small, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "completed after 2 steps" in done.stdout
    assert "</html>" in (tmp_path / "run/report.html").read_text()


@pytest.mark.long
def test_it_has_its_command_and_its_settings(installed):
    assert (installed / "bin/grpo").is_file()
    assert {path.name for path in (installed / "grpo/configs").iterdir()} == {
        path.name for path in (ROOT / "configs").iterdir()
    }
    assert not (installed / "grpo/configs").is_symlink()
