import math

import numpy as np
import pytest
import torch

from grpo.learner.batch import MicroBatch
from grpo.learner.diagnostics import Diagnostics


def micro_batch(seed, mask_BK, versions_BK):
    generator = torch.Generator().manual_seed(seed)
    behavior_BK = torch.randn(mask_BK.shape, generator=generator) - 2
    return MicroBatch(mask_BK, behavior_BK, torch.zeros(0), versions_BK, None, None)


@pytest.fixture
def parts():
    """Two micro-batches of a step at version 5, with tokens of versions 3 to 5; garbage in masked places."""
    found = []
    for seed, shape in ((0, (3, 5)), (1, (2, 8))):
        generator = torch.Generator().manual_seed(10 + seed)
        mask_BK = torch.rand(shape, generator=generator) < 0.7
        versions_BK = torch.randint(3, 6, shape, generator=generator)
        versions_BK[0] = 5
        micro = micro_batch(seed, mask_BK, versions_BK)
        logprobs_BK = micro.behavior_logprobs_BK + 0.5 * torch.randn(shape, generator=generator)
        entropy_BK = torch.rand(shape, generator=generator)
        clipped_BK = (torch.rand(shape, generator=generator) < 0.3).float()
        garbage = [value_BK.masked_fill(~mask_BK, math.nan) for value_BK in (logprobs_BK, entropy_BK)]
        found.append((micro, *garbage, {"ratio": torch.ones(shape), "clip_fraction": clipped_BK}))
    return found


def tokens(parts):
    """(log ratio, entropy, clipped, age, all of its completion of this version) of every token."""
    for micro, logprobs_BK, entropy_BK, of_loss in parts:
        for b, t in micro.mask_BK.nonzero().tolist():
            own = all(int(v) == 5 for v, m in zip(micro.versions_BK[b], micro.mask_BK[b], strict=True) if m)
            log_ratio = float(logprobs_BK[b, t]) - float(micro.behavior_logprobs_BK[b, t])
            age = 5 - int(micro.versions_BK[b, t])
            yield log_ratio, float(entropy_BK[b, t]), float(of_loss["clip_fraction"][b, t]), age, own


def measured(parts, at_version=True):
    diagnostics = Diagnostics(version=5)
    for micro, logprobs_BK, entropy_BK, of_loss in parts:
        diagnostics.add(micro, logprobs_BK, entropy_BK, of_loss, at_version=at_version)
    return diagnostics.metrics()


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def slow_off_policy(log_ratios):
    ratios = [math.exp(x) for x in log_ratios]
    return {
        "ratio_mean": mean(ratios),
        "ratio_max": max(ratios),
        "kl_k1": mean(-x for x in log_ratios),
        "kl_k3": mean(r - 1 - x for r, x in zip(ratios, log_ratios, strict=True)),
        "ess": sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios)),
    }


def test_all_tokens_of_all_micro_batches_count_alike(parts):
    metrics, seen = measured(parts), list(tokens(parts))
    for name, value in slow_off_policy([x for x, *_ in seen]).items():
        assert metrics[f"mismatch/{name}"] == pytest.approx(value, rel=1e-5), name
    assert metrics["mismatch/logprob_abs_diff"] == pytest.approx(mean(abs(x) for x, *_ in seen), rel=1e-5)
    assert metrics["trainer/entropy"] == pytest.approx(mean(entropy for _, entropy, *_ in seen), rel=1e-5)
    assert metrics["trainer/clip_fraction"] == pytest.approx(mean(clipped for _, _, clipped, *_ in seen))
    ratios = np.exp([x for x, *_ in seen])
    for p in (1, 50, 99):
        assert metrics[f"mismatch/ratio_p{p:02}"] == pytest.approx(np.percentile(ratios, p), rel=1e-5)


def test_every_age_has_numbers_of_its_own(parts):
    metrics, seen = measured(parts), list(tokens(parts))
    for age in (0, 1, 2):
        those = [token for token in seen if token[3] == age]
        prefix = f"mismatch/age_{age}/"
        for name, value in slow_off_policy([x for x, *_ in those]).items():
            assert metrics[prefix + name] == pytest.approx(value, rel=1e-5), name
        assert metrics[prefix + "tokens"] == len(those)
        assert metrics[prefix + "entropy"] == pytest.approx(mean(entropy for _, entropy, *_ in those), rel=1e-5)
        assert metrics[prefix + "clip_fraction"] == pytest.approx(mean(clipped for _, _, clipped, *_ in those))
    assert sum(metrics[f"mismatch/age_{age}/tokens"] for age in range(3)) == len(seen)


def test_the_two_engines_are_compared_only_on_completions_of_this_very_version(parts):
    own = [abs(log_ratio) for log_ratio, *_, is_own in tokens(parts) if is_own]
    assert 0 < len(own) < len(list(tokens(parts)))
    assert measured(parts)["mismatch/logprob_abs_diff_same_version"] == pytest.approx(mean(own), rel=1e-5)


def test_in_the_middle_of_a_step_the_engines_can_not_be_compared(parts):
    assert "mismatch/logprob_abs_diff_same_version" not in measured(parts, at_version=False)


def test_fresh_samples_are_worth_all_of_themselves_and_one_huge_ratio_next_to_nothing():
    mask_BK, versions_BK = torch.ones(1, 100, dtype=torch.bool), torch.full((1, 100), 5)
    micro = micro_batch(0, mask_BK, versions_BK)
    fresh_BK = micro.behavior_logprobs_BK
    off_BK = fresh_BK.clone()
    off_BK[0, 0] += 12
    of_loss = {"ratio": torch.ones(1, 100)}
    assert measured([(micro, fresh_BK, fresh_BK, of_loss)])["mismatch/ess"] == 1
    assert measured([(micro, off_BK, fresh_BK, of_loss)])["mismatch/ess"] == pytest.approx(0.01, rel=1e-2)


def test_a_loss_of_somebodys_own_may_report_what_it_likes(parts):
    parts = [(*part[:3], {"boldness": torch.full(part[0].mask_BK.shape, 0.25)}) for part in parts]
    metrics = measured(parts)
    assert metrics["trainer/boldness"] == 0.25
    assert "trainer/clip_fraction" not in metrics
    assert "mismatch/age_1/ess" in metrics


def test_a_step_without_tokens_has_nothing_to_say():
    assert Diagnostics(version=3).metrics() == {}
