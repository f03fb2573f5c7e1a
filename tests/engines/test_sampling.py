import numpy as np
import pytest
import torch

from grpo.engines.torch.sampling import RowSampler, uniforms
from grpo.types import SamplingParams

CPU = torch.device("cpu")
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
POINTS = 4000

SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=3),
    SamplingParams(top_k=50),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=0.95, temperature=1.7),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_k=4, top_p=0.7),
    SamplingParams(top_k=7, top_p=0.9, temperature=1.3),
]


def some_logits(count=1, vocabulary=11):
    return 2 * torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(4))


def reference_distribution(logits, params):
    """Written from the definition, token by token in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    if params.temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    weights = np.exp((logits - logits.max()) / params.temperature)
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    kept, total = [], sum(weights[token] for token in ranked)
    for token in ranked:
        kept.append(token)
        if sum(weights[token] for token in kept) >= params.top_p * total:
            break
    if params.top_p == 1:
        kept = ranked
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def draw_over_grid(logits_V, params):
    uniforms_B = (torch.arange(POINTS) + 0.5) / POINTS
    return RowSampler([params] * POINTS, CPU).draw(logits_V.expand(POINTS, -1), uniforms_B)


@pytest.mark.parametrize("vocabulary", [11, 300])  # at once, and by chunks
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_tokens_appear_as_often_as_the_reference_says(params, vocabulary):
    logits_V = some_logits(vocabulary=vocabulary)[0]
    tokens_B, _ = draw_over_grid(logits_V, params)
    frequencies = np.bincount(tokens_B, minlength=len(logits_V)) / POINTS
    # A grid of N uniforms hits an interval of length p between pN - 1 and pN + 1 times.
    np.testing.assert_allclose(frequencies, reference_distribution(logits_V, params), atol=1.01 / POINTS)


@pytest.mark.parametrize("vocabulary", [11, 300])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_logprobs_are_those_of_the_filtered_distribution(params, vocabulary):
    logits_V = some_logits(vocabulary=vocabulary)[0]
    tokens_B, logprobs_B = draw_over_grid(logits_V, params)
    expected = np.log(reference_distribution(logits_V, params)[tokens_B.numpy()])
    np.testing.assert_allclose(logprobs_B, expected, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [11, 300])
def test_every_row_of_a_mixed_batch_follows_its_own_parameters(vocabulary):
    mixed = [*SETTINGS, SamplingParams(temperature=0.0), SamplingParams(temperature=0.0)] * 5
    logits_BV = some_logits(len(mixed), vocabulary)
    uniforms_B = uniforms(0, 0, len(mixed))
    tokens_B, logprobs_B = RowSampler(mixed, CPU).draw(logits_BV, uniforms_B)
    for i, params in enumerate(mixed):
        token, logprob = RowSampler([params], CPU).draw(logits_BV[i : i + 1], uniforms_B[i : i + 1])
        assert (tokens_B[i], logprobs_B[i]) == (token[0], pytest.approx(logprob[0].item(), abs=1e-6))
        assert reference_distribution(logits_BV[i], params)[tokens_B[i]] > 0


@pytest.mark.parametrize("vocabulary", [11, 300])
def test_greedy_rows_take_the_largest_logit_and_its_logprob_at_temperature_one(vocabulary):
    logits_BV = some_logits(6, vocabulary)
    rows = [SamplingParams(temperature=0.0), SamplingParams()] * 3
    for u in (0.0, 0.5, BELOW_ONE):
        tokens_B, logprobs_B = RowSampler(rows, CPU).draw(logits_BV, torch.full((6,), u))
        assert tokens_B[::2].tolist() == logits_BV[::2].argmax(dim=1).tolist()
        np.testing.assert_allclose(logprobs_B[::2], torch.log_softmax(logits_BV, dim=1)[::2].amax(dim=1), atol=1e-6)


@pytest.mark.parametrize("u", [0.0, BELOW_ONE])
@pytest.mark.parametrize(
    ("vocabulary", "impossible"),
    [
        *((11, words) for words in ([0, 1], [5], [9, 10], [0, 4, 5, 10])),
        *((300, list(words)) for words in (range(128), range(128, 256), range(250, 300), (0, 127, 255, 299))),
    ],
)
def test_tokens_of_probability_zero_are_never_drawn(u, vocabulary, impossible):
    logits_BV = some_logits(50, vocabulary)
    logits_BV[:, impossible] = -torch.inf
    tokens_B, logprobs_B = RowSampler([SamplingParams()] * 50, CPU).draw(logits_BV, torch.full((50,), u))
    assert not set(impossible) & set(tokens_B.tolist())
    assert torch.isfinite(logprobs_B).all()


@pytest.mark.parametrize("u", [0.0, BELOW_ONE])
@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.3)], ids=str)
def test_filtered_tokens_are_never_drawn_from_a_large_vocabulary(u, params):
    logits_BV = some_logits(4, vocabulary=20_000)  # enough terms for the total to miss 1
    logits_BV[:, [0, -1]] = -20.0
    tokens_B, _ = RowSampler([params] * 4, CPU).draw(logits_BV, torch.full((4,), u))
    for logits_V, token in zip(logits_BV, tokens_B, strict=True):
        assert reference_distribution(logits_V, params)[token] > 0


@pytest.mark.parametrize("vocabulary", [7, 130, 300])
def test_the_last_possible_token_is_within_reach(vocabulary):
    logits_BV = torch.zeros(1, vocabulary)
    logits_BV[:, -1] = -torch.inf
    token, _ = RowSampler([SamplingParams()], CPU).draw(logits_BV, torch.tensor([BELOW_ONE]))
    assert token.item() == vocabulary - 2


def test_top_k_keeps_k_tokens_also_when_they_tie():
    tokens_B, logprobs_B = draw_over_grid(torch.zeros(5), SamplingParams(top_k=2))
    assert len(set(tokens_B.tolist())) == 2
    np.testing.assert_allclose(logprobs_B, np.log(0.5), atol=1e-6)


def test_low_precision_logits_are_sampled_in_float32():
    logits_BV = some_logits(8).bfloat16()
    _, logprobs_B = RowSampler([SamplingParams()] * 8, CPU).draw(logits_BV, uniforms(1, 0, 8))
    assert logprobs_B.dtype == torch.float32


def test_uniforms_follow_from_seed_and_sample_alone():
    assert torch.equal(uniforms(5, 2, 40), uniforms(5, 2, 40))
    assert torch.equal(uniforms(5, 2, 7), uniforms(5, 2, 40)[:7])  # whatever the limit of the request
    assert not torch.equal(uniforms(5, 2, 40), uniforms(5, 3, 40))
    assert not torch.equal(uniforms(5, 2, 40), uniforms(6, 2, 40))
    assert not torch.equal(uniforms(5, 2, 40), uniforms(2, 5, 40))


def test_uniforms_lie_in_the_unit_interval():
    drawn = uniforms(0, 0, 5000)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)


def test_a_filter_in_the_batch_takes_nothing_from_an_unfiltered_row():
    logits_BV = torch.tensor([[-20.0, 0.0, 0.0]] * 2)  # the others' probabilities round to 1 without the first
    tokens_B, logprobs_B = RowSampler([SamplingParams(), SamplingParams(top_k=1)], CPU).draw(logits_BV, torch.zeros(2))
    assert tokens_B.tolist()[0] == 0
    assert logprobs_B[0] == pytest.approx(-20 - np.log(2), abs=1e-5)
    assert tokens_B.tolist()[1] != 0
