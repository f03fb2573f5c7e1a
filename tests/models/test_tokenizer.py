"""Loading a tokenizer in a process that computes nothing."""

import os
import subprocess
import sys

import pytest

from grpo.config.actors import ModelConfig
from grpo.models.tokenizer import load_tokenizer

PROGRAM = """
import os, sys
from grpo.config.actors import ModelConfig
from grpo.models.tokenizer import load_tokenizer
{before}
print(load_tokenizer(ModelConfig(path={path!r}), text_only=True).encode("dbca>"))
print("torch" in sys.modules, "TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ)
import torch, transformers
print(torch.ones(1).item(), transformers.utils.is_torch_available())
"""


@pytest.mark.parametrize(
    ("before", "with_torch"), [("", False), ("import transformers", True), ("import torch", True)], ids=str
)
def test_text_alone_needs_no_torch_and_takes_it_from_nobody(tiny_model_path, before, with_torch):
    program = PROGRAM.format(before=before, path=tiny_model_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    expected = load_tokenizer(ModelConfig(path=tiny_model_path)).encode("dbca>")
    assert done.stdout.splitlines() == [str(expected), f"{with_torch} False", f"1.0 {with_torch}"]
    assert done.stderr == ""
