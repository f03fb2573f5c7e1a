"""`python scripts/export.py` as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.checkpoint.store import find_checkpoint, save_checkpoint
from grpo.cli.export import export
from grpo.config.actors import LoraConfig, ModelConfig, TrainerConfig
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.errors import CheckpointError
from grpo.learner.learner import Learner
from grpo.learner.objective import Objective
from grpo.models.export import export_adapters, export_model
from grpo.models.loading import load_model
from grpo.models.lora import add_adapters
from grpo.weights.payload import trained_parameters

SCRIPT = Path(__file__).parents[2] / "scripts/export.py"
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def learner(tiny_model_path):
    model = load_model(ModelConfig(path=tiny_model_path), torch.float32, "cpu")
    objective = Objective(LossConfig(), CorrectionConfig())
    learner = Learner(model, TrainerConfig(), objective, temperature=1.0, age_bound=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return learner


@pytest.fixture
def run(tmp_path, tiny_model_path, learner):
    """A run's folder with two checkpoints of the same model in bfloat16."""

    def write(parameters, folder):
        export_model(ModelConfig(path=tiny_model_path), parameters, torch.bfloat16, folder)

    for step in (50, 100):
        save_checkpoint(tmp_path / "run/checkpoints", step, [learner.state()], [], {}, write)
    return tmp_path / "run"


@pytest.fixture
def type_command(tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_a_run_becomes_an_ordinary_folder_with_the_learners_logits(run, learner, tmp_path, type_command):
    done = type_command(str(run), "exported", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{run}/checkpoints/step_000100 -> exported\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(model), logits(learner.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").eos_token == "<eos>"


def test_a_run_without_checkpoints_is_one_line_and_exit_code_1(tmp_path, type_command):
    done = type_command(str(tmp_path), "exported")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: no intact checkpoint: no step_* in {tmp_path}/checkpoints; name")
    assert len(done.stderr.splitlines()) == 1


def test_a_checkpoint_itself_can_be_named(run, tmp_path):
    path = run / "checkpoints/step_000050"
    assert export(path, tmp_path / "exported", torch.bfloat16) == (path, [])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == torch.bfloat16


def test_a_folder_of_checkpoints_can_be_named(run):
    assert find_checkpoint(run / "checkpoints") == (run / "checkpoints/step_000100", [])


def test_a_broken_checkpoint_is_told_of_and_the_one_before_is_used(run):
    broken = run / "checkpoints/step_000100"
    (broken / "trainer.safetensors").unlink()
    checkpoint, [warning] = find_checkpoint(run)
    assert checkpoint == run / "checkpoints/step_000050"
    assert "trainer.safetensors is missing" in warning
    with pytest.raises(CheckpointError, match=r"trainer\.safetensors is missing"):
        find_checkpoint(broken)


def test_a_folder_in_use_is_left_alone(run, tmp_path):
    with pytest.raises(CheckpointError, match="is already there; name a folder that is new or empty"):
        export(run, run, torch.bfloat16)
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty", torch.bfloat16)


def test_what_can_not_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    def failing(source, parameters, dtype, folder):
        folder.mkdir()
        raise ValueError("two\nlines")

    monkeypatch.setattr("grpo.models.export.export_model", failing)
    with pytest.raises(CheckpointError, match="exported can't be written: two lines"):
        export(run, tmp_path / "exported", torch.bfloat16)
    assert not (tmp_path / "exported").exists()


@pytest.fixture
def adapted(tmp_path, tiny_model_path):
    """A run's folder with a checkpoint of adapters, and the model with them."""
    base, lora = ModelConfig(path=tiny_model_path), LoraConfig(rank=4)
    model = load_model(base, torch.float32, "cpu")
    add_adapters(model, lora)
    learner = Learner(model, TrainerConfig(), Objective(LossConfig(), CorrectionConfig()), temperature=1.0, age_bound=0)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.05)

    def write(parameters, folder):
        export_adapters(base, lora, parameters, folder)

    save_checkpoint(tmp_path / "adapted/checkpoints", 3, [learner.state()], [], {}, write)
    return tmp_path / "adapted", model


def test_adapters_are_merged_into_their_model(adapted, tmp_path):
    run, model = adapted
    assert export(run, tmp_path / "exported", torch.float32) == (run / "checkpoints/step_000003", [])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(logits(exported), logits(model), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").eos_token == "<eos>"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft, under transformers 5.24
def test_adapters_alone_are_what_peft_loads(adapted, tmp_path, tiny_model_path):
    run, model = adapted
    export(run, tmp_path / "exported", torch.bfloat16, adapters=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "exported")), logits(model))


def test_the_whole_of_a_model_is_no_adapter(run, tmp_path):
    with pytest.raises(CheckpointError, match="is of a whole model, not of adapters: leave out --adapters"):
        export(run, tmp_path / "exported", torch.bfloat16, adapters=True)
    assert not (tmp_path / "exported").exists()
