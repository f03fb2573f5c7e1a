"""A small config for the actors, and completions to give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo.config.actors import GeneratorConfig, ModelConfig, ReferenceConfig, TrainerConfig
from grpo.config.algorithm import BufferConfig, LossConfig, RewardConfig, RolloutConfig, TaskConfig
from grpo.config.schema import RunConfig
from grpo.models.tiny import character_tokenizer
from grpo.types import Completion, Group, Problem, Prompt


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices of this size gain nothing from a second thread, and lose much where it has to wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def config(tiny_model_path):
    return RunConfig(
        model=ModelConfig(path=tiny_model_path),
        task=TaskConfig("grpo.tasks.sorting:Sorting", {"train_size": 12, "held_out_size": 4}),
        rollout=RolloutConfig(group_size=2, max_prompt_tokens=8, max_completion_tokens=6),
        reward=RewardConfig(),
        loss=LossConfig(),
        buffer=BufferConfig(max_policy_age=1),
        trainer=TrainerConfig(lr=1e-2, groups_per_step=1),
        generator=GeneratorConfig(max_sequences=8),
        reference=ReferenceConfig(),
    )


@pytest.fixture
def make_completion():
    def make(token_ids, version=0):
        length = len(token_ids)
        return Completion(np.array(token_ids), np.full(length, -2, np.float32), ((version, length),), "stop")

    return make


@pytest.fixture
def answers(tokenizer, make_completion):
    """Completions that say the given texts, each ended by the eos token."""
    return lambda *texts: [make_completion([*tokenizer.encode(text), tokenizer.eos_token_id]) for text in texts]


@pytest.fixture
def prompt(tokenizer):
    return Prompt(0, Problem("cab>", "abc"), np.array(tokenizer.encode("cab>")))


@pytest.fixture
def make_group(prompt, answers):
    def make(advantages=(1.0, -1.0), version=0):
        return Group(prompt, answers("abc", "cab"), None, (1.0, 0.0), advantages, oldest_version=version)

    return make
