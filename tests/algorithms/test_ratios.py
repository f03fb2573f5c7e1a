import math

import pytest
import torch

from grpo.algorithms.corrections import bounded, log_ratio


def test_what_stands_in_masked_places_has_no_influence():
    policy_BT, other_BT = torch.tensor([[-1.0, math.nan, -math.inf]]), torch.tensor([[-3.0, -1.0, -math.inf]])
    found_BT = log_ratio(policy_BT, other_BT, torch.tensor([[True, False, False]]))
    assert found_BT.tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ratio_however_far_off_has_an_exp_with_a_finite_square_and_gradient(dtype):
    values_T = torch.tensor([-math.inf, -1e4, 0.5, 1e4, math.inf], dtype=dtype, requires_grad=True)
    ratio_T = bounded(values_T).exp()
    (ratio_T**2).sum().backward()
    assert ratio_T.isfinite().all()
    assert values_T.grad.isfinite().all()
    assert ratio_T[2].item() == pytest.approx(math.exp(0.5), rel=1e-2)
