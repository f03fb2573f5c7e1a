"""The learner: optimizer steps on batches of groups, snapshots of its state, weights to publish."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from grpo.checkpoint.trainer_state import StateWriter, TrainerState
from grpo.config.actors import TrainerConfig
from grpo.errors import CheckpointError, NonFiniteError, StalenessError
from grpo.learner.batch import RankBatch, Sample, collate, samples_of, split_batch
from grpo.learner.diagnostics import Diagnostics
from grpo.learner.fsdp import checkpoint_layers, compile_layers, shard
from grpo.learner.logprobs import TokenLogprobs
from grpo.learner.objective import Objective
from grpo.telemetry.recording import span
from grpo.types import Batch, Floats
from grpo.utils.ranks import Ranks
from grpo.weights.payload import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COUNTERS = {"nonfinite_steps", "nonfinite_in_a_row", "schedule_position", "optimizer_steps"}


class Learner:
    """A model, its trained parameters in float32 and their optimizer. Computes and publishes in `compute_dtype`.

    With several `ranks` each holds its rows of every parameter and trains on some groups of every batch. Every method
    is then called on all ranks at once. `as_reference` replaces a separate reference model for the KL term: inside
    that context the model computes as the reference (adapters are off).

    Example:
        objective = Objective(LossConfig("dapo"), CorrectionConfig())
        learner = Learner(model, TrainerConfig(lr=1e-5), objective, temperature=1.0, age_bound=1)
        metrics = learner.train_step(Batch(groups))  # learner.version is 1 now
        weights = learner.weights()                  # a snapshot for the generators
        snapshot = learner.state()                   # written over by the next call; see `restore`
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainerConfig,
        objective: Objective,
        *,
        temperature: float,
        age_bound: int,
        compute_dtype: torch.dtype = torch.float32,
        ranks: Ranks = Ranks.alone(),
        as_reference: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.model, self._ranks = model.train(), ranks
        self._logprobs = TokenLogprobs(model, temperature, config.packing)  # probes the model, before it is sharded
        if config.compile:
            compile_layers(model)
        if config.gradient_checkpointing:
            checkpoint_layers(model)
        self._sharding = shard(model, ranks, compute_dtype)
        self.version = 0
        self.nonfinite_steps, self._nonfinite_in_a_row = 0, 0
        self._config, self._age_bound = config, age_bound
        self._compute_dtype = compute_dtype
        self._device = model.device
        self._objective, self._as_reference = objective, as_reference
        beta1, beta2 = config.betas
        self._optimizer = torch.optim.AdamW(
            self._sharding.parameters.values(),
            lr=config.lr,
            betas=(beta1, beta2),
            weight_decay=config.weight_decay,
            fused=True,  # one pass over memory
        )
        schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self._schedule = transformers.get_scheduler(schedule, self._optimizer, config.warmup_steps, config.max_steps)
        self._states = StateWriter(self._sharding.parameters, self._sharding.rows, self._optimizer, ranks.rank)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Take `updates_per_batch` optimizer steps, each on its part of the groups; returns metrics by name.

        The loss of an update is divided by what `loss.aggregation` counts in its groups, zero advantages included, so
        the split into micro-batches has no influence. Groups without any advantage cost no forward pass. An update
        whose gradient is not finite is skipped and counted. The version increases by one in any case. Raises
        StalenessError for a group that is older than the bound, NonFiniteError when more than `max_nonfinite_steps`
        updates in a row were skipped.
        """
        ages = [self.version - group.oldest_version for group in batch.groups]
        if max(ages) > self._age_bound:
            raise StalenessError(
                f"a group of age {max(ages)} at version {self.version}; the bound is {self._age_bound}"
            )
        diagnostics, lr = Diagnostics(self.version, self._ranks), self._schedule.get_last_lr()[0]
        groups = [samples_of(group) for group in batch.groups]
        samples = [sample for group in groups for sample in group]

        # Every update sees other groups. All of them count as one step of the schedule and of the version.
        updates = [self._update(i, part, diagnostics) for i, part in enumerate(self._split(groups))]
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

    def _split(self, groups: Sequence[list[Sample]]) -> list[RankBatch]:
        """Return this rank's part of each update."""
        objective = self._objective
        scale = objective.advantage_scale([sample.advantage for group in groups for sample in group])
        updates = []
        for part in np.array_split(np.arange(len(groups)), min(len(groups), self._config.updates_per_batch)):
            chosen = [groups[i] for i in part]
            updates.append(
                split_batch(
                    chosen,
                    self._ranks,
                    self._plan,
                    advantage_scale=scale,
                    denominator=objective.denominator([s.trained_length for group in chosen for s in group]),
                    keep_zero_advantage=objective.trains_zero_advantage,
                )
            )
        # An update without work would count as a finite one. One is left, so that a step has metrics.
        updates = [update for update in updates if update.dummy_sample] or updates[:1]
        if objective.needs_proximal:  # in the first update the policy itself is the proximal one
            updates[1:] = [replace(update, samples=self._with_proximal(update)) for update in updates[1:]]
        return updates

    def _plan(self, samples: Sequence[Sample]) -> list[list[int]]:
        return self._logprobs.plan(samples, self._config.micro_batch_tokens)

    def _with_proximal(self, update: RankBatch) -> list[Sample]:
        """Add the log-probabilities under the policy at the start of the step."""

        def forward() -> list[Floats]:
            logprobs = self._logprobs.of_samples(update.samples, self._config.micro_batch_tokens)
            for _ in range(update.dummy_passes):
                self._logprobs(update.dummy_sample)
            return logprobs

        with span("forward", sequences=len(update.samples)), self._autocast(), torch.no_grad():
            logprobs = self._sharding.compute(forward)
        return [
            replace(sample, proximal_logprobs=logprobs_T)
            for sample, logprobs_T in zip(update.samples, logprobs, strict=True)
        ]

    def _update(self, number: int, update: RankBatch, diagnostics: Diagnostics) -> tuple[float, float]:
        """Take one optimizer step; returns the loss and the norm of the gradient before it was clipped."""
        loss = 0.0
        for part in self._plan(update.samples):
            samples = [update.samples[i] for i in part]
            loss += self._backward(samples, update.denominator, diagnostics, first=number == 0)
        for _ in range(update.dummy_passes):
            self._dummy_pass(update.dummy_sample)
        with span("optimizer"):
            loss, grad_norm = self._clip_gradient(loss)
            self._optimizer_step(loss, grad_norm)
        return loss, grad_norm

    def _backward(
        self, samples: Sequence[Sample], denominator: float, diagnostics: Diagnostics, *, first: bool
    ) -> float:
        """Add a micro-batch's part of the gradient; returns its part of the loss."""
        micro = collate(samples, self._device)
        if self._as_reference is not None:
            micro = replace(micro, reference_logprobs_BK=micro.unflatten(self._reference_logprobs(samples)))
        with span("forward", sequences=len(samples)):
            logprobs_BK, entropy_BK = map(micro.unflatten, self._forward(samples))
        output = self._objective(logprobs_BK, micro, denominator)
        with span("backward"):
            output.loss.backward()

        # Off-policy diagnostics compare the sampler with the weights at the start of the step, where these are known.
        proximal_BK = micro.proximal_logprobs_BK
        at_version = first or proximal_BK is not None
        start_BK = logprobs_BK.detach() if proximal_BK is None else proximal_BK
        diagnostics.add(micro, start_BK, entropy_BK, output.metrics, at_version=at_version)
        return float(output.loss.detach())

    @torch.no_grad()
    def _reference_logprobs(self, samples: Sequence[Sample]) -> Tensor:
        """float32 [N], in the same layout as the training pass: equal weights give equal numbers."""
        assert self._as_reference is not None
        with span("reference", sequences=len(samples)), self._as_reference():
            return self._forward(samples)[0]

    def _forward(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities and entropies; see TokenLogprobs."""
        with self._autocast():
            return self._sharding.compute(lambda: self._logprobs(samples))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._compute_dtype, enabled=self._compute_dtype != torch.float32)

    def _dummy_pass(self, samples: Sequence[Sample]) -> None:
        """Take part in the collectives of a forward and a backward pass, adding zeros to the gradient."""
        if self._as_reference is not None:
            self._reference_logprobs(samples)
        logprobs_N, _ = self._forward(samples)
        (0.0 * logprobs_N).sum().backward()

    def _clip_gradient(self, loss: float) -> tuple[float, float]:
        """Sum the loss and the squared norm over all ranks, then clip the gradient to `max_grad_norm`."""
        parameters = self._sharding.with_gradients()
        part = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        loss, squared = self._ranks.all_reduce([loss, float(part) * float(part)])
        norm = math.sqrt(squared)
        clip_grads_with_norm_(parameters, self._config.max_grad_norm, torch.full_like(part, norm))
        return loss, norm

    def _optimizer_step(self, loss: float, grad_norm: float) -> None:
        """Apply the gradient, or drop it if it is not finite."""
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
        self._optimizer.step()  # changes nothing without gradients, but the schedule warns when it is left out
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Weights | None:
        """Write a snapshot to publish, on rank 0; see WeightsWriter.write."""
        return self._sharding.weights(self.version)

    def state(self) -> TrainerState:
        """Write this rank's part of a snapshot, from which `restore` resumes bit for bit.

        The next call overwrites its buffer.
        """
        counters = {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "schedule_position": self._schedule.last_epoch,
        }
        return self._states.write(self.version, counters)

    def restore(self, states: Sequence[TrainerState]) -> None:
        """Resume from a snapshot, given as the parts of any number of ranks.

        The learning rate is the config's at that position of the schedule. Raises CheckpointError, on every rank and
        before anything is changed, when states of some ranks are missing, don't fit the model, or are not finite.
        """
        counters = states[0].counters
        if missing := sorted(_COUNTERS - counters.keys()):
            raise CheckpointError(f"the trainer's state lacks {missing}")
        self._states.check(states)
        self._states.read(states)
        for parameter in self._sharding.with_gradients():
            parameter.grad = None  # may be left from a step that failed half-way

        position, schedule, (settings,) = counters["schedule_position"], self._schedule, self._optimizer.param_groups
        settings["lr"] = schedule.base_lrs[0] * schedule.lr_lambdas[0](position)
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": position, "_last_lr": [settings["lr"]]})
        self.nonfinite_steps = counters["nonfinite_steps"]
        self._nonfinite_in_a_row = counters["nonfinite_in_a_row"]
        self.version = states[0].version
