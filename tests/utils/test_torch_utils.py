"""A GPU is asked for, and is not there; played by patches of torch, since tests have none."""

import pytest
import torch

from grpo.config.schema import RunConfig
from grpo.driver.weight_sync import broadcast_backend
from grpo.errors import ConfigError
from grpo.utils.torch_utils import check_device, device_for


def test_a_share_of_a_gpu_is_on_it():
    assert [device_for(share) for share in (0, 0.25, 1, 8)] == ["cpu", "cuda", "cuda", "cuda"]
    check_device("cpu", "bfloat16")


@pytest.mark.parametrize(
    ("trainer", "generator", "engine", "backend"),
    [(0, 0, "torch", "gloo"), (1, 2, "torch", "nccl"), (0.5, 0.5, "torch", "gloo"), (1, 0, "torch", "gloo"),
     (1, 1, "vllm", "gloo")],
)  # fmt: skip
def test_weights_go_over_nccl_where_all_have_whole_gpus_to_themselves(trainer, generator, engine, backend):
    config = RunConfig()
    config.trainer.num_gpus, config.generator.num_gpus, config.generator.engine = trainer, generator, engine
    assert broadcast_backend(config) == backend
    config.trainer.ranks = 2
    assert broadcast_backend(config) == "gloo"
    config.trainer.ranks, config.weight_sync.backend = 1, "gloo"
    assert broadcast_backend(config) == "gloo"


@pytest.mark.parametrize(
    ("built_for", "reason"), [(None, "it is built without CUDA"), ("13.0", "the driver is missing or too old")]
)
def test_a_gpu_that_torch_does_not_find_is_one_line_with_the_reason(monkeypatch, built_for, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(ConfigError, match=rf"num_gpus: Ray gave this actor a GPU, but torch .* has none: {reason};"):
        check_device("cuda", "float32")


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    check_device("cuda", "float32")
    with pytest.raises(ConfigError, match=r"model\.dtype: Tesla T4 does not compute in bfloat16 .*; take float32"):
        check_device("cuda", "bfloat16")
