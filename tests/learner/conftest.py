"""Random groups and small learners. Token ids run from 3 on: below are pad, eos and unknown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rank_processes import RankProcesses
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grpo.config import CorrectionConfig, LossConfig, TrainerConfig
from grpo.learner import learner as learner_module
from grpo.learner.collate import collate
from grpo.learner.learner import Learner
from grpo.learner.objective import Objective
from grpo.models.tiny import tiny_llama
from grpo.types import Completion, Group, Problem, Prompt

EOS = 1


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
    """Small, and peaked enough that a wrong position or token shows in its log-probabilities."""
    model = tiny_llama(width=32, layers=2, heads=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return model


@pytest.fixture
def make_group():
    def make(prompt_length, lengths, advantages, *, seed=0, version=0, reference=False, eos=EOS):
        rng = np.random.default_rng(seed)

        def floats(length):
            return rng.normal(-3, 0.5, size=length).astype(np.float32)

        completions = [
            Completion(
                token_ids=np.append(rng.integers(3, 60, size=length - 1), eos),
                logprobs=floats(length),
                versions=((version, length),),
                finish_reason="stop",
            )
            for length in lengths
        ]
        return Group(
            prompt=Prompt(seed, Problem("?", "!"), rng.integers(3, 60, size=prompt_length)),
            completions=completions,
            reference_logprobs=[floats(length) for length in lengths] if reference else None,
            rewards=tuple(advantages),
            advantages=tuple(advantages),
            oldest_version=version,
        )

    return make


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
    def make(
        of=None, *, temperature=1.0, age_bound=0, dtype=torch.float32, beta=0.0, loss=None, correction=None, **trainer
    ):
        settings = TrainerConfig(**({"lr": 1e-3, "max_grad_norm": 1e9} | trainer))
        loss = loss or LossConfig(beta=beta, clip_low=0.2, clip_high=0.2)
        objective = Objective(loss, correction or CorrectionConfig())
        options = {"temperature": temperature, "age_bound": age_bound, "compute_dtype": dtype}
        return Learner(of or model, settings, objective, **options)

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
