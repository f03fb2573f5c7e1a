"""One optimizer step on a batch of groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_scheduler

from grpo.algorithms.losses import LOSSES, LossOutput
from grpo.config import LossConfig, TrainerConfig
from grpo.learner.collate import MicroBatch, Sample, collate, plan, samples_of
from grpo.learner.logprobs import token_logprobs
from grpo.learner.state import StateWriter, TrainerState
from grpo.types import Batch, CheckpointError, NonFiniteError, StalenessError
from grpo.weights import Weights, WeightsWriter

_COUNTERS = {"nonfinite_steps", "nonfinite_in_a_row", "schedule_position", "optimizer_steps"}


class Learner:
    """Holds the model in float32 and its optimizer; computes in `compute_dtype`, publishes in the same."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainerConfig,
        loss: LossConfig,
        *,
        temperature: float,
        age_bound: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.train()
        if config.gradient_checkpointing:
            renamed = hasattr(model, "activation_checkpointing_enable")  # in transformers, after 5.20
            (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()
        self.version = 0
        self.nonfinite_steps, self._nonfinite_in_a_row = 0, 0
        self._config, self._temperature, self._age_bound = config, temperature, age_bound
        self._compute_dtype = compute_dtype
        self._device = next(model.parameters()).device
        self._loss = make_loss(loss)
        self._trains_zero_advantage = loss.beta > 0  # the KL term pulls on those too
        self._writer = WeightsWriter(model, compute_dtype)
        beta1, beta2 = config.betas
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay
        )
        schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self._schedule = get_scheduler(schedule, self._optimizer, config.warmup_steps, config.max_steps)
        self._states = StateWriter(model, self._optimizer)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step; returns metrics by name.

        The loss is divided by the number of completion tokens of the whole batch, so the split into micro-batches
        doesn't matter. Groups without any advantage count there, but cost no forward pass. A step whose gradient is
        not finite is skipped and counted. The version moves in any case. Raises StalenessError for a group that is
        older than the bound, NonFiniteError when more than `max_nonfinite_steps` in a row had to be skipped.
        """
        ages = [self.version - group.oldest_version for group in batch.groups]
        if max(ages) > self._age_bound:
            raise StalenessError(
                f"a group of age {max(ages)} at version {self.version}; the bound is {self._age_bound}"
            )
        samples = [sample for group in batch.groups for sample in samples_of(group)]
        trained = samples if self._trains_zero_advantage else [sample for sample in samples if sample.advantage != 0]
        token_count = sum(len(sample.behavior_logprobs) for sample in samples)
        loss, sums = self._backward(trained, token_count)
        grad_norm = float(clip_grad_norm_(self.model.parameters(), self._config.max_grad_norm))
        lr = self._schedule.get_last_lr()[0]
        self._update(loss, grad_norm)
        self._schedule.step()
        self.version += 1
        return {
            "loss": loss,
            "policy_age/max": float(max(ages)),
            "policy_age/mean": sum(ages) / len(ages),
            "trainer/grad_norm": grad_norm,
            "trainer/lr": lr,
            "trainer/tokens": float(token_count),
            "trainer/zero_advantage_fraction": 1 - sum(sample.advantage != 0 for sample in samples) / len(samples),
            "trainer/nonfinite_steps": float(self.nonfinite_steps),
            **_means(sums),
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

    def _backward(self, samples: list[Sample], token_count: int) -> tuple[float, Mapping[str, float]]:
        loss, sums = 0.0, defaultdict[str, float](float)
        for part in plan([len(sample) for sample in samples], self._config.micro_batch_tokens):
            micro = collate([samples[i] for i in part], self._device)
            with torch.autocast(self._device.type, self._compute_dtype, enabled=self._compute_dtype != torch.float32):
                logprobs_BK = token_logprobs(self.model, micro, self._temperature)
            output = self._loss(
                logprobs_BK,
                micro.behavior_logprobs_BK,
                micro.advantages_BK,
                micro.mask_BK,
                reference_logprobs_BT=micro.reference_logprobs_BK,
                denominator=token_count,
            )
            output.loss.backward()
            loss += float(output.loss.detach())
            for name, value in [
                *output.metrics.items(),
                *self._agreement(logprobs_BK.detach(), micro).items(),
            ]:
                sums[name] += float(value)
        return loss, sums

    def _agreement(self, logprobs_BK: torch.Tensor, micro: MicroBatch) -> dict[str, torch.Tensor]:
        """How far trainer and generator are apart on completions sampled with the very weights of this step.

        Completions under way during an update are left out: their keys and values may be of older weights.
        """
        other_BK = micro.mask_BK & (micro.versions_BK != self.version)
        same_BK = micro.mask_BK & ~other_BK.any(dim=1, keepdim=True)
        gap_BK = (logprobs_BK - micro.behavior_logprobs_BK).abs()
        return {
            "tokens": micro.mask_BK.sum(),
            "surprise": -logprobs_BK[micro.mask_BK].sum(),
            "same_version_tokens": same_BK.sum(),
            "same_version_gap": gap_BK[same_BK].sum(),
        }

    def _move_schedule(self, position: int) -> None:
        (settings,), schedule = self._optimizer.param_groups, self._schedule
        settings["lr"] = schedule.base_lrs[0] * schedule.lr_lambdas[0](position)
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": position, "_last_lr": [settings["lr"]]})

    def _update(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._nonfinite_in_a_row = 0
        else:
            self.nonfinite_steps += 1
            self._nonfinite_in_a_row += 1
            self._optimizer.zero_grad(set_to_none=True)
        if self._nonfinite_in_a_row > self._config.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self._nonfinite_in_a_row} steps in a row were not finite (the last: loss {loss}, gradient norm "
                f"{grad_norm}); lower trainer.lr or trainer.max_grad_norm, and look for extreme rewards"
            )
        self._optimizer.step()  # without gradients it changes nothing, but the schedule warns when it is left out
        self._optimizer.zero_grad(set_to_none=True)


def make_loss(config: LossConfig) -> Callable[..., LossOutput]:
    return partial(LOSSES[config.name], clip_low=config.clip_low, clip_high=config.clip_high, beta=config.beta)


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means of what was summed over the tokens trained on; left out where there were none."""
    tokens, same = sums.get("tokens", 0), sums.get("same_version_tokens", 0)
    names = {
        "ratio": "trainer/ratio_mean",
        "clip_fraction": "trainer/clip_fraction",
        "surprise": "trainer/entropy",  # the mean of -log p over sampled tokens estimates it
        "behavior_abs": "mismatch/behavior_abs",
        "behavior_k3": "mismatch/behavior_k3",
        "reference_k3": "trainer/reference_kl",
    }
    means = {label: sums[name] / tokens for name, label in names.items() if name in sums and tokens}
    if same:
        means["mismatch/same_version_abs"] = sums["same_version_gap"] / same
    return means
