"""Small models, random groups and learners, also for tests that run in processes of their own.

Token ids run from 3 on: below are pad, eos and unknown.
"""

from __future__ import annotations

import numpy as np
import torch

from grpo.config.actors import TrainerConfig
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.learner.learner import Learner
from grpo.learner.objective import Objective
from grpo.types import Completion, Group, Problem, Prompt, Turn

EOS = 1
EPISODES = [  # (sampled, given) tokens of each turn
    [(3, 2), (1, 4), (2, 0)],
    [(1, 1), (1, 0)],
    [(1, 0)],
    [(4, 7), (5, 0)],
]


def peaked(model):
    """So much so that a wrong position or token shows in its log-probabilities."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return model.eval()


def make_group(prompt_length, lengths, advantages, *, seed=0, version=0, reference=False, eos=EOS):
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


def episode(runs, rng, *, eos=1, version=0):
    turns = tuple(Turn(sampled, given) for sampled, given in runs)
    parts = [[*rng.integers(3, 60, sampled - 1), eos, *rng.integers(3, 60, given)] for sampled, given in runs]
    sampled = sum(turn.sampled for turn in turns)
    logprobs = rng.normal(-3, 0.5, sampled).astype(np.float32)
    return Completion(np.concatenate(parts).astype(np.int64), logprobs, ((version, sampled),), "stop", turns)


def episode_group(*, eos=1, advantages=(1.0, -0.5, 0.25, -1.0), seed=0, reference=False):
    rng = np.random.default_rng(seed)
    prompt = Prompt(seed, Problem("?", "!"), rng.integers(3, 60, size=4))
    completions = [episode(runs, rng, eos=eos) for runs in EPISODES]
    references = [rng.normal(-3, 0.5, c.sampled_count).astype(np.float32) for c in completions]
    return Group(prompt, completions, references if reference else None, advantages, advantages, oldest_version=0)


def make_learner(
    model,
    *,
    temperature=1.0,
    age_bound=0,
    dtype=torch.float32,
    beta=0.0,
    loss=None,
    correction=None,
    ranks=None,
    as_reference=None,
    **trainer,
):
    settings = TrainerConfig(**({"lr": 1e-3, "max_grad_norm": 1e9} | trainer))
    loss = loss or LossConfig(beta=beta)
    objective = Objective(loss, correction or CorrectionConfig())
    options = {"temperature": temperature, "age_bound": age_bound, "compute_dtype": dtype}
    options["as_reference"] = as_reference
    return Learner(model, settings, objective, **options, **({"ranks": ranks} if ranks else {}))
