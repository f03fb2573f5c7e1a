"""One optimizer step on a batch of groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from grpo.config import TrainerConfig
from grpo.learner.collate import Sample, collate, samples_of
from grpo.learner.diagnostics import Diagnostics
from grpo.learner.logprobs import TokenLogprobs
from grpo.learner.objective import Objective
from grpo.learner.state import StateWriter, TrainerState
from grpo.telemetry.recording import span
from grpo.types import Batch, CheckpointError, NonFiniteError, StalenessError
from grpo.weights import Weights, WeightsWriter

if TYPE_CHECKING:  # the module behind it takes a second to import
    from transformers import PreTrainedModel

_COUNTERS = {"nonfinite_steps", "nonfinite_in_a_row", "schedule_position", "optimizer_steps"}


@dataclass(frozen=True)
class Share:
    """What one update is made of: the samples that cost a forward pass, and what their loss is divided by."""

    samples: Sequence[Sample]
    denominator: float


class Learner:
    """Holds the model in float32 and its optimizer; computes in `compute_dtype`, publishes in the same."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainerConfig,
        objective: Objective,
        *,
        temperature: float,
        age_bound: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.train()
        self._logprobs = TokenLogprobs(model, temperature, config.packing)
        if config.gradient_checkpointing:
            renamed = hasattr(model, "activation_checkpointing_enable")  # in transformers, after 5.20
            (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()
        self.version = 0
        self.nonfinite_steps, self._nonfinite_in_a_row = 0, 0
        self._config, self._age_bound = config, age_bound
        self._compute_dtype = compute_dtype
        self._device = next(model.parameters()).device
        self._objective = objective
        self._writer = WeightsWriter(model, compute_dtype)
        beta1, beta2 = config.betas
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay
        )
        schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self._schedule = get_scheduler(schedule, self._optimizer, config.warmup_steps, config.max_steps)
        self._states = StateWriter(model, self._optimizer)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Take `updates_per_batch` optimizer steps, each on its share of the groups; returns metrics by name.

        The loss of each is divided by what `loss.aggregation` counts in its share, zero advantages included, so the
        split into micro-batches doesn't matter; but groups without any advantage cost no forward pass. An update whose
        gradient is not finite is skipped and counted. The version moves by one in any case. Raises StalenessError for
        a group that is older than the bound, NonFiniteError when more than `max_nonfinite_steps` in a row had to be
        skipped.
        """
        ages = [self.version - group.oldest_version for group in batch.groups]
        if max(ages) > self._age_bound:
            raise StalenessError(
                f"a group of age {max(ages)} at version {self.version}; the bound is {self._age_bound}"
            )
        diagnostics, lr = Diagnostics(self.version), self._schedule.get_last_lr()[0]
        groups = [samples_of(group) for group in batch.groups]
        samples = [sample for group in groups for sample in group]
        updates = [self._update(i, share, diagnostics) for i, share in enumerate(self._shares(groups))]
        losses, grad_norms = zip(*updates, strict=True)
        self._schedule.step()
        self.version += 1
        return {
            "loss": fmean(losses),
            "policy_age/max": float(max(ages)),
            "policy_age/mean": sum(ages) / len(ages),
            "trainer/grad_norm": fmean(grad_norms),
            "trainer/lr": lr,
            "trainer/tokens": float(sum(sample.trained_length for sample in samples)),
            "trainer/zero_advantage_fraction": 1 - sum(sample.advantage != 0 for sample in samples) / len(samples),
            "trainer/nonfinite_steps": float(self.nonfinite_steps),
            **diagnostics.metrics(),
        }

    def weights(self) -> Weights:
        """A snapshot to publish; see WeightsWriter.write."""
        return self._writer.write(self.version)

    def state(self) -> TrainerState:
        """A snapshot for another learner to go on from, bit for bit. The next call overwrites its buffer."""
        counters = {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "schedule_position": self._schedule.last_epoch,
        }
        return self._states.write(self.version, counters)

    def restore(self, state: TrainerState) -> None:
        """Go on from a snapshot; the learning rate is the config's at that point of the schedule.

        Raises CheckpointError, before anything is changed, when it does not fit the model or holds NaN or infinity.
        """
        counters = state.counters
        if missing := sorted(_COUNTERS - counters.keys()):
            raise CheckpointError(f"the trainer's state lacks {missing}")
        self._states.check(state)
        self._states.read(state)
        self._optimizer.zero_grad(set_to_none=True)  # a step that failed half-way may have left some
        self._move_schedule(counters["schedule_position"])
        self.nonfinite_steps = counters["nonfinite_steps"]
        self._nonfinite_in_a_row = counters["nonfinite_in_a_row"]
        self.version = state.version

    def _shares(self, groups: Sequence[list[Sample]]) -> list[Share]:
        """One for each update; those after the first know the policy at the start of the step, if need be."""
        scale = self._objective.advantage_scale([sample.advantage for group in groups for sample in group])
        parts = np.array_split(np.arange(len(groups)), min(len(groups), self._config.updates_per_batch))
        shares = [self._share([sample for i in part for sample in groups[i]], scale) for part in parts]
        shares = [share for share in shares if share.samples] or shares[:1]  # an update of nothing would count as one
        if self._objective.needs_proximal:
            shares[1:] = [replace(share, samples=self._with_proximal(share.samples)) for share in shares[1:]]
        return shares

    def _share(self, samples: Sequence[Sample], scale: float) -> Share:
        trained = [s for s in samples if s.trained and (s.advantage != 0 or self._objective.trains_zero_advantage)]
        return Share(
            [replace(sample, advantage=scale * sample.advantage) for sample in trained],
            self._objective.denominator([sample.trained_length for sample in samples]),
        )

    def _with_proximal(self, samples: Sequence[Sample]) -> list[Sample]:
        with span("forward", sequences=len(samples)), self._autocast():
            logprobs = self._logprobs.of_samples(samples, self._config.micro_batch_tokens)
        return [replace(sample, proximal_logprobs=found_T) for sample, found_T in zip(samples, logprobs, strict=True)]

    def _update(self, number: int, share: Share, diagnostics: Diagnostics) -> tuple[float, float]:
        """One optimizer step; returns the loss and the norm of the gradient before it was clipped."""
        loss = 0.0
        for part in self._logprobs.plan(share.samples, self._config.micro_batch_tokens):
            samples = [share.samples[i] for i in part]
            loss += self._backward(samples, share.denominator, diagnostics, first=number == 0)
        with span("optimizer"):
            grad_norm = float(clip_grad_norm_(self.model.parameters(), self._config.max_grad_norm))
            self._step(loss, grad_norm)
        return loss, grad_norm

    def _backward(
        self, samples: Sequence[Sample], denominator: float, diagnostics: Diagnostics, *, first: bool
    ) -> float:
        """Add a micro-batch's part of the gradient; returns its part of the loss."""
        micro = collate(samples, self._device)
        with span("forward", sequences=len(samples)), self._autocast():
            logprobs_BK, entropy_BK = map(micro.spread, self._logprobs(samples))
        output = self._objective(logprobs_BK, micro, denominator)
        with span("backward"):
            output.loss.backward()
        proximal_BK = micro.proximal_logprobs_BK
        at_version = first or proximal_BK is not None
        seen_BK = logprobs_BK.detach() if proximal_BK is None else proximal_BK
        diagnostics.add(micro, seen_BK, entropy_BK, output.metrics, at_version=at_version)
        return float(output.loss.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._compute_dtype, enabled=self._compute_dtype != torch.float32)

    def _move_schedule(self, position: int) -> None:
        (settings,), schedule = self._optimizer.param_groups, self._schedule
        settings["lr"] = schedule.base_lrs[0] * schedule.lr_lambdas[0](position)
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": position, "_last_lr": [settings["lr"]]})

    def _step(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._nonfinite_in_a_row = 0
        else:
            self.nonfinite_steps += 1
            self._nonfinite_in_a_row += 1
            self._optimizer.zero_grad(set_to_none=True)
        if self._nonfinite_in_a_row > self._config.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self._nonfinite_in_a_row} updates in a row were not finite (the last: loss {loss}, gradient norm "
                f"{grad_norm}); lower trainer.lr or trainer.max_grad_norm, and look for extreme rewards"
            )
        self._optimizer.step()  # without gradients it changes nothing, but the schedule warns when it is left out
        self._optimizer.zero_grad(set_to_none=True)
