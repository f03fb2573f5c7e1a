from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

from grpo.errors import CheckpointError, NonFiniteError
from grpo.models.tiny import tiny_llama
from grpo.types import Batch
from grpo.weights.flat_buffer import views


@pytest.fixture
def batches(make_group):
    def group(step, seed, advantages):
        return make_group(3 + seed, [6, 2, 4], advantages, seed=10 * step + seed, version=step)

    return [Batch([group(step, 1, [1.2, -0.7, -0.5]), group(step, 2, [0.0, 0.9, -0.9])]) for step in range(6)]


@pytest.fixture
def idle_batches(make_group):
    return [Batch([make_group(2, [5, 4], [0.0, 0.0], version=step)]) for step in range(6)]


def snapshot(learner):
    """Everything that a state holds, as copies."""
    state = learner.state()
    return {name: tensor.clone() for name, tensor in state.tensors()}, state.version, copy.deepcopy(state.counters)


def assert_same(found, expected):
    (tensors, *rest), (expected_tensors, *expected_rest) = found, expected
    assert rest == expected_rest
    assert tensors.keys() == expected_tensors.keys()
    for name in tensors:
        assert torch.equal(tensors[name], expected_tensors[name]), name


def stored(state):
    """As it comes back from an object store and a JSON file: read-only, owned by nobody."""
    outside = []
    pickled = pickle.dumps(state, protocol=5, buffer_callback=outside.append)
    assert len(pickled) < state.buffer.nbytes / 10
    received = pickle.loads(pickled, buffers=[bytes(buffer.raw()) for buffer in outside])
    return dataclasses.replace(received, counters=json.loads(json.dumps(state.counters)))


def other_model():
    return tiny_llama(width=32, layers=2, heads=2, seed=9).eval()


SETTINGS = {
    "plain": {},
    "weight decay and clipping": {"weight_decay": 0.1, "max_grad_norm": 0.01},
    "warmup": {"warmup_steps": 4},
    "linear": {"lr_schedule": "linear", "max_steps": 8, "warmup_steps": 1},
    "cosine": {"lr_schedule": "cosine", "max_steps": 7},
    "bfloat16": {"dtype": torch.bfloat16},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_learner_goes_on_bit_for_bit(make_learner, batches, settings, steps):
    learner = make_learner(**settings)
    for batch in batches[:steps]:
        learner.train_step(batch)
    state = stored(learner.state())
    expected = [learner.train_step(batch) for batch in batches[steps : steps + 3]]

    restored = make_learner(other_model(), **settings)
    restored.restore([state])
    assert [restored.train_step(batch) for batch in batches[steps : steps + 3]] == expected
    assert_same(snapshot(restored), snapshot(learner))
    published = zip(restored.weights().tensors(), learner.weights().tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in published)


def test_parameters_that_never_had_a_gradient_go_on_without_moments(make_learner, batches, model):
    def frozen(learner):
        learner.model.model.layers[1].requires_grad_(False)
        return learner

    learner, decay = frozen(make_learner(weight_decay=0.1)), {"weight_decay": 0.1}
    learner.train_step(batches[0])
    state = stored(learner.state())
    assert 0 < len(state.counters["optimizer_steps"]) < len(list(model.parameters()))
    restored = frozen(make_learner(other_model(), **decay))
    restored.restore([state])
    restored.model.requires_grad_(True)
    learner.model.requires_grad_(True)  # from now on they have: their first step, not their second
    assert restored.train_step(batches[1]) == learner.train_step(batches[1])
    assert_same(snapshot(restored), snapshot(learner))


def test_steps_without_a_gradient_are_not_counted_as_the_optimizers(make_learner, batches, idle_batches):
    learner = make_learner(lr_schedule="linear", max_steps=6)
    learner.train_step(idle_batches[0])
    learner.train_step(batches[1])
    learner.train_step(idle_batches[2])
    state = stored(learner.state())
    assert (state.version, state.counters["schedule_position"]) == (3, 3)
    assert set(state.counters["optimizer_steps"].values()) == {1}
    restored = make_learner(other_model(), lr_schedule="linear", max_steps=6)
    restored.restore([state])
    assert restored.train_step(batches[3]) == learner.train_step(batches[3])
    assert_same(snapshot(restored), snapshot(learner))


def test_restoring_undoes_what_was_trained_since(make_learner, batches):
    learner = make_learner()
    learner.train_step(batches[0])
    state = stored(learner.state())
    before = snapshot(learner)
    expected = learner.train_step(batches[1])
    learner.model.model.norm.weight.grad = torch.ones(32)  # as a step leaves it that failed half-way
    learner.restore([state])
    assert_same(snapshot(learner), before)
    assert learner.train_step(batches[1]) == expected


def test_the_first_state_forgets_later_moments(make_learner, batches):
    learner = make_learner()
    first = stored(learner.state())
    learner.train_step(batches[0])
    learner.restore([first])
    assert stored(learner.state()).counters == first.counters
    assert np.array_equal(learner.state().buffer, first.buffer)


def test_random_numbers_go_on(make_learner):
    learner = make_learner()
    with torch.random.fork_rng(devices=[]):
        state = stored(learner.state())
        expected = torch.rand(3)
        learner.restore([state])
        assert torch.equal(torch.rand(3), expected)


def test_another_learning_rate_may_go_on_from_a_state(make_learner, idle_batches):
    learner = make_learner(lr=0.01, lr_schedule="linear", max_steps=4)
    learner.train_step(idle_batches[0])
    other = make_learner(other_model(), lr=0.1, lr_schedule="linear", max_steps=4)
    other.restore([stored(learner.state())])
    assert other.train_step(idle_batches[1])["trainer/lr"] == pytest.approx(0.075)


def test_steps_that_are_not_finite_stay_counted(make_learner, make_group):
    broken = Batch([make_group(3, [2], [math.nan])])
    learner, other = (make_learner(of, age_bound=9, max_nonfinite_steps=1) for of in (None, other_model()))
    learner.train_step(broken)
    other.restore([stored(learner.state())])
    assert other.nonfinite_steps == 1
    with pytest.raises(NonFiniteError):
        other.train_step(broken)


def test_the_buffer_is_used_again(make_learner, batches):
    learner = make_learner()
    first = learner.state()
    learner.train_step(batches[0])
    assert learner.state().buffer is first.buffer


def test_a_state_of_a_gpu_goes_on_without_one(make_learner):
    learner = make_learner()
    state = stored(learner.state())
    extra = dataclasses.replace(state.specs[-1], name="rng.cuda", shape=(16,))
    learner.restore([dataclasses.replace(state, specs=(*state.specs, extra))])


def with_first_spec(state, **changes):
    first, *rest = state.specs
    return dataclasses.replace(state, specs=(dataclasses.replace(first, **changes), *rest))


def without_counter(state, name):
    return dataclasses.replace(state, counters={k: v for k, v in state.counters.items() if k != name})


def with_value(state, name, value):
    changed = dataclasses.replace(state, buffer=state.buffer.copy())
    dict(views(changed.specs, changed.buffer))[name].view(-1)[3] = value
    return changed


NORM, EMBEDDING = "model.norm.weight", r"\['model\.model\.embed_tokens\.weight'\]"
MISFITS = {
    "renamed": (lambda s: with_first_spec(s, name="model.other"), r"does not fit .*'model\.model\.embed_tokens"),
    "reshaped": (lambda s: with_first_spec(s, shape=s.specs[0].shape[::-1]), EMBEDDING),
    "other dtype": (lambda s: with_first_spec(s, dtype=torch.int32), EMBEDDING),
    "missing": (lambda s: dataclasses.replace(s, specs=s.specs[:-1]), r"\['rng\.cpu'\]"),
    "no position": (lambda s: without_counter(s, "schedule_position"), r"lacks \['schedule_position'\]"),
    "strange counts": (
        lambda s: dataclasses.replace(s, counters={**s.counters, "optimizer_steps": {"x": 1}}),
        r"unknown parameters: \['x'\]",
    ),
    "nan": (lambda s: with_value(s, f"model.{NORM}", math.nan), rf"^model\.{NORM} holds NaN or infinity"),
    "infinity": (lambda s: with_value(s, f"exp_avg.{NORM}", math.inf), rf"^exp_avg\.{NORM} holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_can_not_be_used_is_refused_before_anything_changes(make_learner, batches, change, message):
    learner = make_learner()
    learner.train_step(batches[0])
    state = stored(learner.state())
    other = make_learner(other_model())
    other.train_step(batches[0])
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=message):
        other.restore([change(state)])
    assert_same(snapshot(other), before)


def test_a_state_that_is_not_finite_can_still_be_looked_at(make_learner):
    learner = make_learner()
    with torch.no_grad():
        learner.model.model.norm.weight[3] = math.nan
    assert torch.isnan(dict(learner.state().tensors())[f"model.{NORM}"][3])
