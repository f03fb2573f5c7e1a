"""Random groups and small learners."""

from __future__ import annotations

import learner_parts
import numpy as np
import pytest
import torch
from rank_processes import RankProcesses
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grpo.learner import learner as learner_module
from grpo.learner.batch import collate
from grpo.models.tiny import tiny_llama


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices of this size gain nothing from a second thread, and lose much where it has to wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rank_processes():
    """Whoever asks for it is run where the other tests are that start processes; see tests/conftest.py."""
    processes = RankProcesses()
    yield processes
    processes.close()


@pytest.fixture
def model():
    return learner_parts.peaked(tiny_llama(width=32, layers=2, heads=2))


@pytest.fixture
def make_group():
    return learner_parts.make_group


@pytest.fixture
def slow_logprobs():
    """Log-probabilities of a completion, one sequence at a time, without padding or an attention mask."""

    def compute(model, prompt_ids, token_ids, temperature=1.0):
        ids_T = torch.tensor(np.concatenate([prompt_ids, token_ids]))
        logits_TV = model(ids_T[None]).logits[0, :-1]
        logprobs_TV = (logits_TV / temperature).log_softmax(dim=-1)
        picked_T = logprobs_TV.gather(1, ids_T[1:, None])[:, 0]
        return picked_T[len(prompt_ids) - 1 :]

    return compute


@pytest.fixture
def make_learner(model):
    def make(of=None, **settings):
        return learner_parts.make_learner(of or model, **settings)

    return make


@pytest.fixture
def steps_taken():
    """What every optimizer step was given: (gradients, learning rate)."""
    seen = []

    def record(optimizer, args, kwargs):
        (settings,) = optimizer.param_groups
        gradients = [p.grad.clone() for p in settings["params"] if p.grad is not None]
        if gradients:
            seen.append((gradients, settings["lr"]))

    hook = register_optimizer_step_pre_hook(record)
    yield seen
    hook.remove()


@pytest.fixture
def rows_seen(monkeypatch):
    """Completions in every forward pass."""
    rows = []
    monkeypatch.setattr(
        learner_module, "collate", lambda samples, device: rows.append(len(samples)) or collate(samples, device)
    )
    return rows
