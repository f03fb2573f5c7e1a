"""Imports point down, and each outside library is used where the design says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The rooms of grpo/, from the lowest to the highest: a room imports from itself and from those before it.
LAYERS = (
    "errors", "types", "utils", "telemetry", "config", "weights", "rewards", "environments", "tasks", "models",
    "algorithms", "checkpoint", "learner", "engines", "actors", "services", "cluster", "observe", "driver", "report",
    "tuning", "cli",
)  # fmt: skip
FILES_AT_THE_ROOT = {"__init__.py", "types.py", "errors.py"}

# Outside libraries that only some rooms, or files of them, may touch.
ONLY_IN = {
    "ray": {"cluster"},
    "hydra": {"config", "cli"},
    "omegaconf": {"config", "cli", "report"},
    "pydantic": {"config"},
    "plotly": {"report"},
    "transformers": {"engines", "environments", "learner", "models", "tasks", "cli"},
    "rich": {"observe", "cli", "models", "report"},
    "reasoning_gym": {"tasks"},
    "vllm": {"engines/vllm"},
    "triton": {"engines/torch"},
    "safetensors": {"checkpoint", "models"},
    "peft": {"models"},
    "renderers": {"environments/model_renderer.py"},
    "xxhash": {"weights"},
    "datasets": {"tasks"},
    "huggingface_hub": {"tasks"},
    "math_verify": {"rewards"},
    "tensorboard": {"observe/sinks"},
    "wandb": {"observe/sinks"},
    "trackio": {"observe/sinks"},
}


def modules():
    """Path of every module, relative to grpo/."""
    package = ROOT / "grpo"
    return [path.relative_to(package) for path in sorted(package.rglob("*.py")) if path.parent != package]


def room(path: Path) -> str:
    return path.parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module == "grpo" else [node.module])


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_down(path):
    below = LAYERS[: LAYERS.index(room(path)) + 1]
    for module in imported(ROOT / "grpo" / path):
        library, *rest = module.split(".")
        if library == "grpo" and rest:
            assert rest[0] in below, f"grpo/{path} must not import {module}: {rest[0]} lies above {room(path)}"
        elif library in ONLY_IN:
            assert any(path.is_relative_to(place) for place in ONLY_IN[library]), f"{path} must not import {library}"


def test_every_folder_is_a_room_and_nothing_else_lies_at_the_root():
    package = ROOT / "grpo"
    assert {path.name for path in package.glob("*.py")} == FILES_AT_THE_ROOT
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders == set(LAYERS) - {"errors", "types"}


def test_no_file_is_a_heap():
    long = {path: lines for path in modules() if (lines := len((ROOT / "grpo" / path).read_text().splitlines())) > 400}
    assert not long


def test_the_loop_is_about_a_page():
    assert len((ROOT / "grpo/driver/loop.py").read_text().splitlines()) <= 150


def test_the_models_code_is_imported_where_a_model_is_loaded():
    """It takes as long as torch; the driver looks at it while Ray starts."""
    program = "import sys, grpo.cli.train, grpo.actors.reward; print('transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
