"""Several ranks against one: what they compute, publish and keep is the same."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from learner_parts import episode_group, make_group, make_learner, peaked
from rank_processes import Died
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AttentionInterface

from grpo.checkpoint.store import load_trainer, save_checkpoint
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.errors import CheckpointError
from grpo.learner import learner as learner_module
from grpo.learner.fsdp import compile_layers
from grpo.learner.packed_attention import PACKED_ATTENTION, packed_attention
from grpo.types import Batch
from grpo.utils.ranks import ShardRange


def odd_llama(tied=True, seed=0):
    """No size of it can be divided by two or three, and some have fewer rows than there are ranks."""
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=25,
        intermediate_size=35,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peaked(transformers.LlamaForCausalLM(config))


def ragged(version=0, seed=0):
    """Five groups of very different lengths, of which one has nothing to learn from."""
    return Batch(
        [
            make_group(4, [6, 1, 3], [1.2, -0.7, -0.5], seed=seed + 1, version=version),
            make_group(2, [5, 4, 9], [0.0, 0.0, 0.0], seed=seed + 2, version=version),
            make_group(7, [2, 30, 3], [0.0, 0.9, -0.9], seed=seed + 3, version=version),
            make_group(1, [1, 2], [0.5, -0.5], seed=seed + 4, version=version),
            make_group(9, [12, 8], [-1.0, 1.0], seed=seed + 5, version=version),
        ]
    )


def one_group():
    """There is a rank without any."""
    return Batch([make_group(4, [6, 9, 3], [1.2, -0.7, -0.5], seed=1), make_group(2, [5, 4], [0.0, 0.0])])


def episodes():
    """Turns and replies; most tokens of the longest were given."""
    return Batch([episode_group(seed=1), episode_group(advantages=(0.0, 0.0, 1.0, -1.0), seed=2), *ragged().groups[:2]])


def nothing():
    return Batch([make_group(2, [5, 4], [0.0, 0.0])])


def gradients_of_a_step(ranks, batch, tied, settings):
    """Metrics, and what this rank's optimizer was given: (name, first row, gradient)."""
    learner, seen = make_learner(odd_llama(tied), ranks=ranks, **settings), []
    names = {id(rows): name for name, rows in learner._sharding.parameters.items()}

    def record(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        seen.extend((names[id(p)], p.grad.clone()) for p in group["params"] if p.grad is not None)

    hook = register_optimizer_step_pre_hook(record)
    metrics = learner.train_step(batch)
    hook.remove()
    return metrics, seen


def gathered(answers):
    """Metrics and whole gradients, rank upon rank."""
    everybodys, seen = zip(*answers, strict=True)
    assert all(metrics == everybodys[0] for metrics in everybodys)
    parts = zip(*seen, strict=True)
    return everybodys[0], [(part[0][0], torch.cat([rows for _, rows in part])) for part in parts]


def assert_same(found, expected):
    """Metrics and gradients, up to rounding."""
    (metrics, gradients), (expected_metrics, expected_gradients) = found, expected
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
    scale = max(float(gradient.abs().max()) for _, gradient in expected_gradients)
    for (name, gradient), (expected_name, expected_gradient) in zip(gradients, expected_gradients, strict=True):
        assert name == expected_name
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5 * scale)


DECOUPLED = CorrectionConfig(mode="truncate")
CASES = {
    "packed": {},
    "padded": {"packing": "never"},
    "many micro-batches": {"micro_batch_tokens": 12},
    "checkpointing": {"gradient_checkpointing": True, "micro_batch_tokens": 30},
    "clipped": {"max_grad_norm": 0.1},
    "several updates": {"updates_per_batch": 3, "correction": DECOUPLED, "micro_batch_tokens": 20},
    "fixed horizon": {"loss": LossConfig("dr_grpo"), "packing": "never", "micro_batch_tokens": 12},
}
BATCHES = {"ragged": ragged(), "one group": one_group(), "episodes": episodes()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_ranks_have_the_gradients_of_one(rank_processes, settings, batch, tied):
    expected = gathered([gradients_of_a_step(None, batch, tied, settings)])
    for size in (2, 3):
        assert_same(gathered(rank_processes.run(size, gradients_of_a_step, batch, tied, settings)), expected)


def test_a_batch_without_signal_changes_nothing_on_any_rank(rank_processes):
    for metrics, seen in rank_processes.run(2, gradients_of_a_step, nothing(), True, {}):
        assert (metrics["loss"], metrics["trainer/grad_norm"], metrics["trainer/tokens"]) == (0.0, 0.0, 9.0)
        assert seen == []


def test_in_bfloat16_ranks_differ_from_one_by_rounding(rank_processes):
    settings = {"dtype": torch.bfloat16, "micro_batch_tokens": 40}
    _, expected = gathered([gradients_of_a_step(None, ragged(), False, settings)])
    metrics, found = gathered(rank_processes.run(2, gradients_of_a_step, ragged(), False, settings))
    assert metrics["mismatch/logprob_abs_diff_same_version"] > 0
    norm = torch.cat([gradient.flatten() for _, gradient in expected]).norm()
    for (name, gradient), (_, expected_gradient) in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert float((gradient - expected_gradient).norm()) < 0.02 * float(norm), name


def compiled_gradients_of_a_step(ranks, batch, settings):
    """By a backend that traces the layers as others do, and generates no code."""
    torch.compiler.reset()
    counters.clear()
    settings = {**settings, "compile": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "compile_layers", partial(compile_layers, backend="eager"))
        try:
            return gradients_of_a_step(ranks, batch, True, settings), counters["stats"]["unique_graphs"]
        finally:
            AttentionInterface.register(PACKED_ATTENTION, packed_attention)


@pytest.mark.long
def test_ranks_whose_layers_are_compiled_have_the_gradients_of_one(rank_processes):
    settings = {"gradient_checkpointing": True}
    answers = rank_processes.run(2, compiled_gradients_of_a_step, ragged(), settings)
    answers, graphs = zip(*answers, strict=True)
    assert min(graphs) > 0
    assert_same(gathered(answers), gathered([gradients_of_a_step(None, ragged(), True, settings)]))


def losses(ranks, steps, tied):
    learner = make_learner(odd_llama(tied), ranks=ranks, lr=3e-3, weight_decay=0.1, max_grad_norm=1.0, warmup_steps=3)
    return [learner.train_step(ragged(version=step, seed=10 * step))["loss"] for step in range(steps)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_twenty_steps_have_the_losses_of_one_rank(rank_processes, tied):
    expected = losses(None, 20, tied)
    assert len({round(loss, 3) for loss in expected}) > 10
    for found in rank_processes.run(2, losses, 20, tied):
        assert found == pytest.approx(expected, abs=1e-4)


def trained(ranks, steps=3, restored=None):
    """A learner's state and published weights after some steps, or after it was given the states of others."""
    learner = make_learner(odd_llama(seed=0 if restored is None else 5), ranks=ranks, age_bound=9, weight_decay=0.1)
    for step in range(0 if restored else steps):
        learner.train_step(ragged(version=step, seed=10 * step))
    if restored:
        learner.restore(restored)
    weights, state = learner.weights(), learner.state()
    before = dataclasses.replace(state, buffer=state.buffer.copy())
    loss = learner.train_step(ragged(version=steps, seed=77))["loss"]
    return before, weights, loss


@pytest.fixture(scope="module")
def states_of(rank_processes):
    """Those of the ranks of a learner of one, two or three after three steps."""
    return {size: [state for state, *_ in rank_processes.run(size, trained)] for size in (2, 3)} | {
        1: [trained(None)[0]]
    }


def whole(states):
    """Parameters and moments, put together row by row."""
    parts = {}
    for state in states:
        for spec, (name, tensor) in zip(state.specs, state.tensors(), strict=True):
            if not name.startswith("rng"):
                parts.setdefault(name, {})[state.rows_of(spec).start] = tensor
                assert len(tensor) == state.rows_of(spec).count
    return {name: torch.cat([rows[start] for start in sorted(rows)]) for name, rows in parts.items()}


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_ranks_goes_on_bit_for_bit(rank_processes, states_of, before, after):
    states = states_of[before]
    shuffled = states[::-1]
    answers = rank_processes.run(after, trained, 3, shuffled)
    found, everybodys_weights, everybodys_loss = zip(*answers, strict=True)
    expected = whole(states)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole(found).items())
    assert whole(found).keys() == expected.keys()
    assert {(state.version, str(state.counters)) for state in found} == {(3, str(states[0].counters))}

    _, weights, loss = trained(None, 3, states)
    assert (everybodys_weights[0].buffer == weights.buffer).all()
    assert (everybodys_weights[0].specs, everybodys_weights[0].checksum) == (weights.specs, weights.checksum)
    assert everybodys_weights[1:] == (None,) * (after - 1)
    assert everybodys_loss == pytest.approx([loss] * after, abs=1e-5)


def test_no_rank_keeps_more_than_its_rows(states_of):
    sizes = {size: [state.buffer.nbytes for state in states] for size, states in states_of.items()}
    assert max(sizes[3]) < 0.4 * sizes[1][0]


def with_value(state, name, value):
    changed = dataclasses.replace(state, buffer=state.buffer.copy())
    dict(changed.tensors())[name].view(-1)[0] = value
    return changed


MISFITS = {
    "one is missing": (lambda s: s[:1], "don't have every row of model.model.embed_tokens.weight"),
    "one is there twice": (lambda s: [s[0], s[0], s[1]], "don't have every row"),
    "of different steps": (lambda s: [s[0], dataclasses.replace(s[1], version=4)], "of different steps"),
    "nan in another's": (
        lambda s: [s[0], with_value(s[1], "exp_avg.model.norm.weight", np.nan)],
        "exp_avg.model.norm.weight holds NaN",
    ),
    "fewer rows than it says": (
        lambda s: [s[0], dataclasses.replace(s[1], rows={**s[1].rows, "model.norm.weight": ShardRange(13, 26, 26)})],
        r"differs in \['exp_avg.model.norm.weight'",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_states_that_do_not_belong_together_are_refused(states_of, change, message):
    learner = make_learner(odd_llama(seed=5))
    before = learner.state().buffer.copy()
    with pytest.raises(CheckpointError, match=message):
        learner.restore(change(states_of[2]))
    assert (learner.state().buffer == before).all()


def test_a_checkpoint_of_several_ranks_is_read_as_it_was(states_of, tmp_path):
    exported = {}
    path = save_checkpoint(tmp_path, 3, states_of[3][::-1], [], {}, lambda model, folder: exported.update(model))
    expected = whole(states_of[3])
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in exported.items())
    assert len(exported) == len(list(odd_llama().parameters()))
    for found, state in zip(load_trainer(path), states_of[3], strict=True):
        tensors = dict(state.tensors())
        assert all(torch.equal(tensor, tensors.pop(name)) for name, tensor in found.tensors())
        assert tensors == {}
        assert (found.rank, found.rows, found.counters) == (state.rank, state.rows, state.counters)


def die_in_a_step(ranks):
    learner = make_learner(odd_llama(), ranks=ranks)
    if ranks.rank == 1:
        learner.model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(1))
    learner.train_step(ragged())


def test_a_rank_that_dies_in_a_step_makes_the_others_raise(rank_processes):
    first, second, third = rank_processes.answers(3, die_in_a_step, timeout_s=30.0)
    assert isinstance(second, Died)
    assert isinstance(first, RuntimeError)
    assert isinstance(third, RuntimeError)
