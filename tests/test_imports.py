"""Imports point down, and each outside library is used where the design says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each place may import of the package. A place is a module or a folder of grpo/.
MAY_IMPORT = {
    "types": set(),
    "services": set(),
    "telemetry": {"types"},
    "waiting": {"telemetry"},
    "concurrency": {"structured", "waiting"},
    "pacing": {"types", "concurrency", "waiting"},
    "checksum": set(),
    "flat_buffer": set(),
    "full_attention": set(),
    "fused": set(),
    "weights": {"types", "checksum", "flat_buffer"},
    "broadcast": {"types", "flat_buffer", "network", "weights"},
    "network": set(),
    "adapters": {"types", "flat_buffer", "weights"},
    "compute": set(),
    "device": {"types", "config"},
    "collection": set(),
    "structured": {"types"},
    "imports": {"types"},
    "config": {"pacing"},
    "exit_codes": set(),
    "validation": {"types", "config"},
    "composition": {"types", "config", "validation"},
    "algorithms": {"types"},
    "rewards": {"types", "telemetry"},
    "tasks": {"types", "config", "imports", "rewards"},
    "models": {"types", "config", "device", "checksum", "weights", "adapters", "tasks"},
    "engines": {
        "types", "flat_buffer", "full_attention", "fused", "weights", "adapters", "compute", "telemetry", "structured",
    },
    "learner": {
        "types", "config", "imports", "checksum", "flat_buffer", "full_attention", "fused", "network", "telemetry",
        "weights", "algorithms",
    },
    "failures": {"types", "config", "structured"},
    "watchdog": {"types", "config", "structured", "waiting"},
    "observe": {"types", "imports", "telemetry", "waiting", "structured", "pacing", "failures"},
    "actors": {
        "types", "services", "config", "imports", "weights", "adapters", "broadcast", "compute", "telemetry",
        "rewards", "tasks", "models", "engines", "learner",
    },
    "cluster": {
        "types", "services", "config", "collection", "telemetry", "structured", "waiting", "failures", "device",
        "models", "actors",
    },
    "difficulty": {"types"},
    "prompts": {"types", "services", "waiting", "pacing", "difficulty"},
    "rollout": {"types", "services", "config", "imports", "telemetry", "structured", "algorithms"},
    "transport": {"types", "services", "config", "device", "structured", "telemetry", "broadcast"},
    "weight_sync": {"types", "services", "config", "structured", "waiting", "transport"},
    "run": {"types", "services", "config", "concurrency", "pacing", "prompts", "observe", "weight_sync"},
    "evaluation": {"types", "services", "config", "telemetry", "structured", "waiting", "watchdog", "rollout", "run"},
    "recovery": {"types", "services", "run"},
    "checkpointing": {"types", "waiting", "recovery", "run"},
    "resume": {"types", "config", "learner"},
    "loop": {
        "types", "services", "config", "pacing", "telemetry", "structured", "waiting", "watchdog",
        "prompts", "rollout", "observe", "run", "evaluation", "recovery", "checkpointing", "resume", "weight_sync",
    },
    "control": {"types", "services"},
    "driver": {"config", "exit_codes", "structured", "cluster"},
    "export": {"types", "config", "learner", "models"},
    "command_line": {"types", "config", "exit_codes", "composition"},
    "report": {"types", "observe"},
    "sinks": {"types", "imports", "observe", "cluster"},
    "tuning": {
        "types", "services", "config", "exit_codes", "composition", "structured", "failures", "pacing", "observe",
        "weights", "actors", "cluster", "run", "loop", "report",
    },
}  # fmt: skip

# Outside libraries that only some places may touch.
ONLY_IN = {
    "ray": {"cluster"},
    "hydra": {"composition", "command_line"},
    "omegaconf": {"composition", "command_line", "report"},
    "plotly": {"report"},
    "transformers": {"engines", "learner", "models", "tasks", "preflight"},
    "rich": {"observe", "train", "models", "report"},
    "reasoning_gym": {"tasks"},
    "vllm": {"engines"},
    "triton": {"engines"},
    "safetensors": {"learner", "models"},
    "peft": {"models"},
    "xxhash": {"checksum"},
    "datasets": {"tasks"},
    "huggingface_hub": {"tasks"},
    "math_verify": {"rewards"},
    "tensorboard": {"observe"},
    "wandb": {"observe"},
    "trackio": {"observe"},
}


def places():
    for path in sorted((ROOT / "grpo").rglob("*.py")):
        inner = path.relative_to(ROOT / "grpo")
        if inner.name != "__init__.py" or len(inner.parts) > 1:
            yield inner.parts[0].removesuffix(".py"), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module == "grpo" else [node.module])


@pytest.mark.parametrize(("place", "path"), list(places()), ids=lambda value: str(getattr(value, "name", value)))
def test_imports_point_down(place, path):
    for module in imported(path):
        root, *rest = module.split(".")
        if root == "grpo" and place in MAY_IMPORT:
            assert rest[0] in MAY_IMPORT[place] | {place}, f"{place} must not import {module}"
        if root in ONLY_IN:
            assert place in ONLY_IN[root], f"{place} must not import {root}"


def test_every_place_has_its_line():
    see_everything = {"preflight", "train", "evaluate_model"}
    assert {place for place, _ in places()} == set(MAY_IMPORT) | see_everything


def test_the_loop_is_about_a_page():
    assert len((ROOT / "grpo/driver/loop.py").read_text().splitlines()) <= 140


def test_the_models_code_is_imported_where_a_model_is_loaded():
    """It takes as long as torch; the driver looks at it while Ray starts."""
    program = "import sys, grpo.cli.train, grpo.actors.reward; print('transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
