from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from grpo.algorithms.advantages import ADVANTAGES
from grpo.algorithms.losses import GRPO, LOSSES, LossOutput
from grpo.errors import NonFiniteError, StalenessError
from grpo.telemetry.recording import Recording, context_for
from grpo.types import Batch, Completion, Group, Problem, Prompt


@pytest.fixture
def batch(make_group):
    """Three groups, the middle one with nothing to learn from; behavior log-probabilities are far off-policy."""
    return Batch(
        [
            make_group(4, [6, 1, 3], [1.2, -0.7, -0.5], seed=1),
            make_group(2, [5, 4, 9], [0.0, 0.0, 0.0], seed=2),
            make_group(7, [2, 8, 3], [0.0, 0.9, -0.9], seed=3),
        ]
    )


@pytest.fixture
def idle_batch(make_group):
    return Batch([make_group(2, [5, 4], [0.0, 0.0])])


def snapshot(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model, before):
    return all(map(torch.equal, snapshot(model), before))


def slow_gradients(model, batch, slow_logprobs, *, temperature=1.0, beta=0.0, clip=0.2):
    """Loss and gradients in float64: one completion after another, the formula token by token."""
    model = copy.deepcopy(model).double().eval()
    count = sum(len(completion.token_ids) for group in batch.groups for completion in group.completions)
    loss = 0.0
    for group in batch.groups:
        references = group.reference_logprobs or [None] * len(group.completions)
        for completion, advantage, reference in zip(group.completions, group.advantages, references, strict=True):
            policy_T = slow_logprobs(model, group.prompt.token_ids, completion.token_ids, temperature)
            total = 0.0
            for t, policy in enumerate(policy_T):
                ratio = (policy - float(completion.logprobs[t])).exp()
                total -= torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
                if reference is not None:
                    difference = float(reference[t]) - policy
                    total += beta * (difference.exp() - difference - 1)
            (total / count).backward()
            loss += float(total.detach()) / count
    return loss, [parameter.grad for parameter in model.parameters()]


def assert_gradients(actual, expected, tolerance=1e-6):
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("packing", ["auto", "never"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_equals_that_of_a_slow_float64_loop(
    make_learner, batch, slow_logprobs, steps_taken, temperature, packing
):
    learner = make_learner(temperature=temperature, packing=packing)
    expected_loss, expected = slow_gradients(learner.model, batch, slow_logprobs, temperature=temperature)
    metrics = learner.train_step(batch)
    ((gradients, _),) = steps_taken
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients(gradients, expected)


def test_gradient_with_a_reference_equals_that_of_a_slow_float64_loop(
    make_learner, make_group, slow_logprobs, steps_taken
):
    batch = Batch(
        [
            make_group(4, [6, 1], [1.0, -1.0], seed=1, reference=True),
            make_group(2, [5, 4], [0.0, 0.0], seed=2, reference=True),
        ]
    )
    learner = make_learner(beta=0.1)
    expected_loss, expected = slow_gradients(learner.model, batch, slow_logprobs, beta=0.1)
    metrics = learner.train_step(batch)
    ((gradients, _),) = steps_taken
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert metrics["trainer/reference_kl"] > 0
    assert_gradients(gradients, expected)


def test_the_split_into_micro_batches_does_not_matter(make_learner, model, batch, rows_seen, steps_taken):
    initial = copy.deepcopy(model.state_dict())
    passes, results = [], []
    for micro_batch_tokens in (10_000, 24, 1):
        rows_seen.clear()
        model.load_state_dict(initial)
        results.append(make_learner(micro_batch_tokens=micro_batch_tokens).train_step(batch))
        passes.append(len(rows_seen))
    assert passes == [1, 2, 5]  # five of the nine completions have an advantage
    (whole, _), *others = steps_taken
    for gradients, _ in others:
        assert_gradients(gradients, whole)
    for metrics in results:
        assert metrics == pytest.approx(results[0], rel=1e-5)


def test_the_split_into_micro_batches_leaves_the_same_weights(make_learner, model, batch):
    initial, updated = copy.deepcopy(model.state_dict()), []
    for micro_batch_tokens in (10_000, 24):
        model.load_state_dict(initial)
        make_learner(micro_batch_tokens=micro_batch_tokens, lr=1e-4).train_step(batch)
        updated.append(snapshot(model))
    for a, b in zip(*updated, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not unchanged(model, initial.values())


def test_the_order_of_groups_does_not_matter(make_learner, model, batch, steps_taken):
    initial = copy.deepcopy(model.state_dict())
    make_learner().train_step(batch)
    model.load_state_dict(initial)
    make_learner().train_step(Batch(batch.groups[::-1]))
    assert_gradients(steps_taken[1][0], steps_taken[0][0])


def test_zero_advantage_costs_no_forward_pass_but_counts_in_the_denominator(
    make_learner, make_group, model, rows_seen, steps_taken
):
    useful, idle = make_group(4, [6, 2], [1.0, -1.0], seed=1), make_group(2, [5, 3], [0.0, 0.0], seed=2)
    initial = copy.deepcopy(model.state_dict())
    alone = make_learner().train_step(Batch([useful]))
    model.load_state_dict(initial)
    together = make_learner().train_step(Batch([useful, idle]))
    assert rows_seen == [2, 2]
    assert together["loss"] == pytest.approx(alone["loss"] / 2)  # 8 of 16 tokens
    assert (alone["trainer/tokens"], together["trainer/tokens"]) == (8, 16)
    assert (alone["trainer/zero_advantage_fraction"], together["trainer/zero_advantage_fraction"]) == (0, 0.5)
    (first, _), (second, _) = steps_taken
    assert_gradients([2 * gradient for gradient in second], first)


def test_zero_advantage_is_trained_on_where_there_is_a_reference(make_learner, make_group, rows_seen, steps_taken):
    idle = make_group(2, [5, 3], [0.0, 0.0], reference=True)
    make_learner(beta=0.1).train_step(Batch([idle]))
    assert rows_seen == [2]
    ((gradients, _),) = steps_taken
    assert any(gradient.any() for gradient in gradients)


def test_a_batch_without_any_advantage_moves_the_version_and_nothing_else(
    make_learner, model, batch, idle_batch, rows_seen
):
    learner = make_learner(weight_decay=0.1)
    before = snapshot(model)
    metrics = learner.train_step(idle_batch)
    assert unchanged(model, before)
    assert rows_seen == []
    assert learner.version == 1
    assert metrics["loss"] == metrics["trainer/grad_norm"] == metrics["trainer/nonfinite_steps"] == 0

    learner = make_learner(weight_decay=0.1, age_bound=1)
    learner.train_step(batch)  # now the optimizer has momentum
    before = snapshot(model)
    learner.train_step(idle_batch)
    assert unchanged(model, before)
    assert learner.version == 2


@pytest.mark.parametrize("advantage", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(make_learner, make_group, model, batch, advantage):
    learner = make_learner(age_bound=2, weight_decay=0.1)
    before = snapshot(model)
    metrics = learner.train_step(Batch([*batch.groups, make_group(3, [2], [advantage])]))
    assert unchanged(model, before)
    assert metrics["trainer/nonfinite_steps"] == 1
    assert learner.version == 1

    metrics = learner.train_step(batch)
    assert not unchanged(model, before)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert metrics["trainer/nonfinite_steps"] == 1
    assert learner.weights().version == 2


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(make_learner, make_group, model, batch):
    learner, broken = make_learner(age_bound=9, max_nonfinite_steps=2), Batch([make_group(3, [2], [math.nan])])
    for good in (batch, batch):  # each sets the count back
        assert math.isnan(learner.train_step(broken)["loss"])
        learner.train_step(broken)
        learner.train_step(good)
    before = snapshot(model)
    learner.train_step(broken)
    metrics = learner.train_step(broken)
    assert metrics["trainer/nonfinite_steps"] == 6
    with pytest.raises(NonFiniteError, match=r"3 updates in a row .*loss nan.*trainer\.lr or trainer\.max_grad_norm"):
        learner.train_step(broken)
    assert unchanged(model, before)


def test_the_first_step_that_is_not_finite_may_end_the_run(make_learner, make_group):
    with pytest.raises(NonFiniteError, match="1 updates in a row"):
        make_learner(max_nonfinite_steps=0).train_step(Batch([make_group(3, [2], [math.inf])]))


def test_a_gradient_beyond_the_bound_is_clipped(make_learner, batch, steps_taken):
    learner = make_learner(max_grad_norm=1e-3)
    metrics = learner.train_step(batch)
    ((gradients, _),) = steps_taken
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert metrics["trainer/grad_norm"] > 0.01  # reported as it was before
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_within_the_bound_is_left_alone(make_learner, batch, steps_taken):
    metrics = make_learner(max_grad_norm=1e9).train_step(batch)
    ((gradients, _),) = steps_taken
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert metrics["trainer/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_gradient_of_one_step_does_not_reach_the_next(make_learner, model, batch, steps_taken):
    learner = make_learner(lr=0.0, age_bound=1)
    learner.train_step(batch)
    learner.train_step(batch)
    (first, _), (second, _) = steps_taken
    assert all(map(torch.equal, first, second))


def test_a_group_older_than_the_bound_is_refused(make_learner, make_group, model, idle_batch):
    learner = make_learner(age_bound=1)
    learner.train_step(idle_batch)
    metrics = learner.train_step(Batch([make_group(2, [3], [1.0]), make_group(2, [3], [1.0], version=1)]))
    assert (metrics["policy_age/max"], metrics["policy_age/mean"]) == (1, 0.5)
    before = snapshot(model)
    with pytest.raises(StalenessError, match="age 2 at version 2; the bound is 1"):
        learner.train_step(Batch([make_group(2, [3], [1.0], version=2), make_group(2, [3], [1.0], version=0)]))
    assert unchanged(model, before)
    assert learner.version == 2


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 1 / 2, 1, 1]),
        ("linear", 0, [1, 3 / 4, 1 / 2, 1 / 4]),
        ("linear", 2, [0, 1 / 2, 1, 1 / 2]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 2, [0, 1 / 2, 1, 1 / 2]),
    ],
)
def test_the_learning_rate_follows_the_schedule(make_learner, idle_batch, schedule, warmup, expected):
    learner = make_learner(lr=0.01, lr_schedule=schedule, warmup_steps=warmup, max_steps=4, age_bound=4)
    rates = [learner.train_step(idle_batch)["trainer/lr"] for _ in range(4)]
    assert rates == pytest.approx([0.01 * factor for factor in expected])


def test_the_learning_rate_reported_is_the_one_used(make_learner, batch, steps_taken):
    learner = make_learner(lr=0.01, lr_schedule="linear", max_steps=4, age_bound=2)
    reported = [learner.train_step(batch)["trainer/lr"] for _ in range(2)]
    assert [lr for _, lr in steps_taken] == reported == [0.01, 0.0075]


def test_the_settings_reach_the_optimizer(make_learner, model, batch):
    """One step of AdamW by hand: the first update is lr * sign(gradient), after the decay of lr * weight_decay."""
    learner = make_learner(lr=0.01, weight_decay=0.5, betas=[0.8, 0.99])
    before = snapshot(model)
    learner.train_step(batch)
    largest = max(float((p - 0.995 * b).abs().max()) for p, b in zip(snapshot(model), before, strict=True))
    assert largest == pytest.approx(0.01, rel=1e-3)
    assert learner._optimizer.param_groups[0]["betas"] == (0.8, 0.99)


@pytest.mark.parametrize("packing", ["auto", "never"])
def test_gradient_checkpointing_changes_no_number(make_learner, model, batch, steps_taken, packing):
    initial = copy.deepcopy(model.state_dict())
    plain = make_learner(packing=packing).train_step(batch)
    model.load_state_dict(initial)
    learner, passes = make_learner(packing=packing, gradient_checkpointing=True), []
    first_norm = model.model.layers[0].input_layernorm
    first_norm.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    assert learner.train_step(batch) == pytest.approx(plain, rel=1e-6)
    assert len(passes) == 2  # the backward pass computes it anew
    assert_gradients(steps_taken[1][0], steps_taken[0][0])


def test_bfloat16_computes_in_it_and_keeps_the_weights_in_float32(make_learner, model, batch, steps_taken):
    initial = copy.deepcopy(model.state_dict())
    exact = make_learner().train_step(batch)
    model.load_state_dict(initial)
    learner, dtypes = make_learner(dtype=torch.bfloat16), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    metrics = learner.train_step(batch)
    assert dtypes == [torch.bfloat16]
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for (name, published), parameter in zip(learner.weights().tensors(), model.parameters(), strict=True):
        assert published.dtype == torch.bfloat16, name
        assert torch.equal(published, parameter.to(torch.bfloat16))


def test_published_weights_are_the_models_and_carry_its_version(make_learner, model, batch):
    learner = make_learner()
    learner.train_step(batch)
    weights = learner.weights()
    assert weights.version == 1
    assert all(map(torch.equal, (tensor for _, tensor in weights.tensors()), model.parameters()))


def test_metrics_are_means_over_the_tokens_trained_on(make_learner, model, make_group, slow_logprobs):
    group = make_group(4, [6, 2], [1.0, -1.0], seed=1)
    with torch.no_grad():
        policy_N = torch.cat([slow_logprobs(model, group.prompt.token_ids, c.token_ids) for c in group.completions])
    gap_N = policy_N - torch.tensor(np.concatenate([c.logprobs for c in group.completions]))
    metrics = make_learner().train_step(Batch([group, make_group(2, [5], [0.0])]))
    assert metrics["trainer/ratio_mean"] == pytest.approx(float(gap_N.exp().mean()), rel=1e-4)
    assert metrics["mismatch/logprob_abs_diff"] == pytest.approx(float(gap_N.abs().mean()), rel=1e-4)
    assert metrics["mismatch/logprob_abs_diff_same_version"] == pytest.approx(float(gap_N.abs().mean()), rel=1e-4)
    assert metrics["policy_age/max"] == metrics["policy_age/mean"] == 0


def test_agreement_is_measured_only_on_tokens_of_this_very_version(make_learner, make_group, idle_batch):
    learner = make_learner(age_bound=1)
    learner.train_step(idle_batch)
    assert "mismatch/logprob_abs_diff_same_version" not in learner.train_step(Batch([make_group(2, [3], [1.0])]))


def test_a_loss_is_found_by_its_name(make_learner, batch, monkeypatch):
    seen = []

    class Flat(GRPO):
        def __call__(self, policy_logprobs_BT, *args, **kwargs):
            seen.append((self, kwargs))
            return LossOutput(policy_logprobs_BT.sum() * 0, {})

    monkeypatch.setitem(LOSSES, "grpo", Flat)
    assert make_learner(beta=0.1).train_step(batch)["loss"] == 0
    loss, given = seen[0]
    assert (loss.beta, loss.clip_low, loss.clip_high) == (0.1, 0.2, 0.2)
    assert given["denominator"] == 41


def test_training_raises_the_reward(make_learner, model):
    """One prompt, answers of one token, reward 1 for a token of the upper half of the vocabulary."""
    prompt = Prompt(0, Problem("?", "!"), np.array([5, 6, 7]))
    rng, good_from = np.random.default_rng(0), 38
    learner = make_learner(lr=1e-2, max_grad_norm=1.0)

    def probabilities():
        with torch.no_grad():
            return model(torch.tensor(prompt.token_ids)[None]).logits[0, -1].softmax(dim=-1).double().numpy()

    def good():
        return float(probabilities()[good_from:].sum())

    before = good()
    for step in range(30):
        p = probabilities()
        tokens = rng.choice(len(p), size=16, p=p / p.sum())
        rewards = torch.tensor(tokens >= good_from).float()
        advantages = ADVANTAGES["group_norm"](rewards).tolist()
        completions = [
            Completion(np.array([token]), np.log(p[[token]]).astype(np.float32), ((step, 1),), "length")
            for token in tokens
        ]
        learner.train_step(
            Batch([Group(prompt, completions, None, tuple(rewards.tolist()), tuple(advantages), oldest_version=step)])
        )
    assert before < 0.7
    assert good() > 0.95


def test_a_step_records_what_it_was_busy_with(make_learner, batch):
    recording = Recording(on=True)
    context_for(recording).run(make_learner().train_step, batch)
    names = [span.name for span in recording.drain(keep_recording=False).spans]
    assert names == ["forward", "backward", "optimizer"]
