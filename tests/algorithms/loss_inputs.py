"""Arguments for the losses, and parameters with which their clipping is felt."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grpo.algorithms.losses import LOSSES

AGGREGATIONS = ["token_mean", "sequence_mean", "fixed_horizon"]

TIGHT = {
    "grpo": {"clip_low": 0.1, "clip_high": 0.15},
    "dr_grpo": {"clip_low": 0.1, "clip_high": 0.15},
    "dapo": {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.3},
    "gspo": {"clip_low": 0.02, "clip_high": 0.03},
    "cispo": {"clip_low": 0.3, "clip_high": 0.4},
    "sapo": {"tau_positive": 2.0, "tau_negative": 3.0},
    "reinforce": {"max_ratio": 1.05},
    "ppo_tv": {"max_tv": 0.02},
}


@dataclass(frozen=True)
class Inputs:
    policy_BT: Tensor
    behavior_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor
    reference_BT: Tensor | None

    @property
    def lengths(self):
        return self.mask_BT.sum(dim=1).tolist()

    def loss(self, name, *, denominator=None, **parameters):
        return LOSSES[name](**parameters)(
            self.policy_BT,
            self.behavior_BT,
            self.advantages_BT,
            self.mask_BT,
            reference_logprobs_BT=self.reference_BT,
            denominator=denominator,
        )

    def map(self, function):
        return Inputs(*(function(getattr(self, field.name)) for field in fields(self)))

    def lists(self):
        return [getattr(self, field.name).tolist() for field in fields(self)]


def random_inputs(seed=0, shape=(6, 7)):
    """Float64; row 1 has no unmasked token, row 2 has one; every other seed has advantages that vary within a row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    policy_BT = (0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)).log()
    mask_BT = torch.rand(shape, generator=generator) < 0.7
    mask_BT[1:3] = False
    mask_BT[2, 1] = True
    advantages_BT = normal(1.0)
    return Inputs(
        policy_BT=policy_BT,
        behavior_BT=policy_BT + normal(0.5),
        advantages_BT=advantages_BT if seed % 2 else advantages_BT[:, :1].expand(shape),
        mask_BT=mask_BT,
        reference_BT=policy_BT + normal(0.5),
    )


def value_and_gradient(name, inputs, **kwargs):
    policy_BT = inputs.policy_BT.detach().clone().requires_grad_()
    output = replace(inputs, policy_BT=policy_BT).loss(name, **kwargs)
    output.loss.backward()
    return output.loss.detach(), policy_BT.grad, {key: value.sum() for key, value in output.metrics.items()}
