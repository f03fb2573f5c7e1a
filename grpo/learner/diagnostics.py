"""Metrics of a train step's samples that need no particular loss: off-policy mismatch, also by age, and entropy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo.learner.batch import MicroBatch
from grpo.utils.ranks import Ranks

_PERCENTILES = (1, 50, 99)
_LABELS = {"ratio": "ratio_mean"}
_NO_MEAN = {"log_ratio", "age", "same_version"}  # columns that are not reported as a mean
_BY_AGE = ("entropy", "clip_fraction", "correction_weight", "is_clip_fraction")


class Diagnostics:
    """Collect the tokens of a train step, micro-batch by micro-batch. `version` is the one at the start of the step."""

    def __init__(self, version: int, ranks: Ranks = Ranks.alone()) -> None:
        self._version, self._ranks = version, ranks
        self._tokens: dict[str, list[NDArray[np.float32]]] = {}

    def add(
        self,
        micro: MicroBatch,
        logprobs_BK: Tensor,
        entropy_BK: Tensor,
        loss_metrics: Mapping[str, Tensor],
        *,
        at_version: bool,
    ) -> None:
        """Add per-token tensors without gradient.

        `logprobs_BK` come from the weights of `version` if `at_version`, else from the middle of a step that takes
        several updates.
        """
        stale_BK = micro.mask_BK & (micro.versions_BK != self._version)
        same_BK = ~stale_BK.any(dim=1, keepdim=True).expand(stale_BK.shape) & at_version
        columns = {
            "log_ratio": logprobs_BK - micro.behavior_logprobs_BK,
            "entropy": entropy_BK,
            "age": self._version - micro.versions_BK,
            "same_version": same_BK,
            **loss_metrics,
        }
        values = torch.stack([column_BK.float() for column_BK in columns.values()])[:, micro.mask_BK].cpu().numpy()
        for name, column in zip(columns, values, strict=True):
            self._tokens.setdefault(name, []).append(column)

    def metrics(self) -> dict[str, float]:
        """Return statistics over the tokens that all ranks trained on; empty if there were none.

        `mismatch/` compares the trainer with the policy that sampled, r = trainer / sampler. `kl_k1` and `kl_k3`
        estimate KL(sampler || trainer); `ess` is the effective sample size as a fraction, (sum r)² / (n sum r²).
        `logprob_abs_diff_same_version` covers only completions sampled with the very weights of this step: it shows
        the numerical difference between trainer and engine. Completions that were being sampled during an update are
        left out there: their keys and values may come from older weights.
        """
        tokens = self._gather()
        if not tokens or not len(tokens["age"]):
            return {}
        log_ratio, ages = tokens["log_ratio"], tokens["age"].astype(int)
        percentiles = np.percentile(np.exp(log_ratio), _PERCENTILES)
        metrics = {
            **_off_policy("mismatch/", log_ratio),
            **{f"mismatch/ratio_p{p:02}": value for p, value in zip(_PERCENTILES, percentiles, strict=True)},
            "mismatch/logprob_abs_diff": np.abs(log_ratio).mean(),
            **{f"trainer/{_LABELS.get(name, name)}": tokens[name].mean() for name in tokens if name not in _NO_MEAN},
        }
        if (same := tokens["same_version"] > 0).any():
            metrics["mismatch/logprob_abs_diff_same_version"] = np.abs(log_ratio[same]).mean()
        for age in np.unique(ages):
            prefix, of_age = f"mismatch/age_{age}/", ages == age
            metrics |= _off_policy(prefix, log_ratio[of_age])
            metrics |= {f"{prefix}{name}": tokens[name][of_age].mean() for name in _BY_AGE if name in tokens}
            metrics[f"{prefix}tokens"] = of_age.sum()
        return {name: float(value) for name, value in metrics.items()}

    def _gather(self) -> dict[str, NDArray[np.float64]]:
        """Concatenate the tokens of all ranks, by name; a rank without a group has none."""
        own = {name: np.concatenate(parts) for name, parts in self._tokens.items()}
        by_rank = [tokens for tokens in self._ranks.from_all(own) if tokens]
        names = next(iter(by_rank), {})
        return {name: np.concatenate([tokens[name] for tokens in by_rank], dtype=np.float64) for name in names}


def _off_policy(prefix: str, log_ratio: NDArray[np.float64]) -> dict[str, float]:
    ratio = np.exp(log_ratio)
    return {
        f"{prefix}ratio_mean": ratio.mean(),
        f"{prefix}ratio_max": ratio.max(),
        f"{prefix}kl_k1": -log_ratio.mean(),
        f"{prefix}kl_k3": (ratio - 1 - log_ratio).mean(),
        f"{prefix}ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }
