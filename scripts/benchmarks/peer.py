"""Training against TRL's GRPOTrainer: the same model, prompts, reward, batch, loss and number of threads.

Short completions are those of the default experiment, up to 8 tokens; ragged ones have 1 to 128, ended by chance. TRL
samples with `model.generate`, as it does without vLLM. Ours leaves groups without an advantage out of the forward pass,
and samples for the next step meanwhile: samples are up to one step old.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.figures import Figure
from benchmarks.peer_case import Case, Training
from benchmarks.peer_evaluation import held_out_rewards
from benchmarks.peer_runs import train_ours, train_trl, trl_python
from benchmarks.peer_task import MOST_TOKENS, Ragged
from grpo.models.tiny import prepare
from grpo.tasks.sorting import Sorting

_REWARD = 0.9
_STILL = 1e-6  # a learning rate at which both go on sampling from the distribution that they began with
_WARM_UP = 3  # steps

Pair = tuple[Training, Training]  # ours, TRL's


def run(quick: bool) -> list[Figure]:
    trl_python()
    sorting, ragged = _sorting(), _ragged(quick)
    learning = dataclasses.replace(sorting, most_tokens=12, steps=80, lr=3e-4, lr_schedule="linear", save_every=5)
    rounds, seeds = range(1 if quick else 2), range(1 if quick else 3)
    learned = [_learn(dataclasses.replace(learning, seed=seed)) for seed in seeds]
    # A start takes longer than all these steps: the quick form has the rate of those that learn.
    short_pairs = [pair for pair, _ in learned] if quick else [_train(sorting) for _ in rounds]
    ragged_pairs = [_train(ragged) for _ in rounds]
    return [
        *_throughput("short", short_pairs, at_least=1.5),
        *_throughput("ragged", ragged_pairs, at_least=2.5),
        *_costs(ragged_pairs),
        *_times_to_reward([times for _, times in learned]),
    ]


def _sorting() -> Case:
    """The task of the default experiment, from its model."""
    model = str(prepare(Sorting()))
    return Case(model, "grpo.tasks.sorting:Sorting", most_tokens=8, steps=60, lr=_STILL)


def _ragged(quick: bool) -> Case:
    model = str(prepare(Ragged(), steps=60, batch_size=32))
    return Case(model, "benchmarks.peer_task:Ragged", most_tokens=MOST_TOKENS, steps=7 if quick else 20, lr=_STILL)


def _train(case: Case) -> Pair:
    """One after the other, in folders that are gone afterwards."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as trl:
        return train_ours(case, Path(ours)), train_trl(case, Path(trl))


def _learn(case: Case) -> tuple[Pair, tuple[float, float]]:
    """And the seconds until the held-out reward was reached, with ours and with TRL."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as trl:
        pair = train_ours(case, Path(ours)), train_trl(case, Path(trl))
        rewards = [held_out_rewards(case, training.saved, until=_REWARD) for training in pair]
    ours_s, trl_s = (side.seconds_to(_REWARD, found) for side, found in zip(pair, rewards, strict=True))
    if ours_s is None or trl_s is None:
        raise RuntimeError(f"{case.steps} steps with seed {case.seed} are too few; rewards of ours and TRL: {rewards}")
    return pair, (ours_s, trl_s)


def _throughput(what: str, pairs: Sequence[Pair], at_least: float) -> list[Figure]:
    """Of each the best round; the lengths have to agree, or the two did different work."""
    ours, trl = (max(training.samples_per_s(_WARM_UP) for training in side) for side in zip(*pairs, strict=True))
    tokens = [fmean(training.mean_tokens for training in side) for side in zip(*pairs, strict=True)]
    truncated = [fmean(training.truncated for training in side) for side in zip(*pairs, strict=True)]
    return [
        Figure("peer", f"{what}: ours", ours, "samples/s"),
        Figure("peer", f"{what}: TRL", trl, "samples/s"),
        Figure("peer", f"{what}: ours over TRL", ours / trl, at_least=at_least),
        Figure("peer", f"{what}: mean length, TRL", tokens[1], "tokens"),
        Figure("peer", f"{what}: mean length over TRL's", tokens[0] / tokens[1], at_least=0.9, at_most=1.1),
        Figure("peer", f"{what}: cut off, ours", 100 * truncated[0], "%"),
        Figure("peer", f"{what}: cut off, TRL", 100 * truncated[1], "%"),
    ]


def _costs(pairs: Sequence[Pair]) -> list[Figure]:
    figures = []
    for name, side in zip(("ours", "TRL"), zip(*pairs, strict=True), strict=True):
        startup_s, peak_gib = (min(t.startup_s for t in side), max(t.peak_gib for t in side))
        figures += [
            Figure("peer", f"ragged: start to first trained step, {name}", startup_s, "s"),
            Figure("peer", f"ragged: peak memory, {name}", peak_gib, "GiB"),
        ]
    return figures


def _times_to_reward(times: Sequence[tuple[float, float]]) -> list[Figure]:
    ours_s, trl_s = (fmean(side) for side in zip(*times, strict=True))
    return [
        Figure("peer", f"to held-out reward {_REWARD}: ours", ours_s, "s"),
        Figure("peer", f"to held-out reward {_REWARD}: TRL", trl_s, "s"),
        Figure("peer", f"to held-out reward {_REWARD}: ours over TRL", ours_s / trl_s, at_most=0.6),
    ]
