import numpy as np
import pytest
import torch
from engine_helpers import (
    full_logits,
    greedy,
    greedy_tokens,
    grouped_query_llama,
    prompt_of,
    sliding_mistral,
    weights_of,
)

from grpo.engines.base import Limits
from grpo.engines.torch import batch as batch_module
from grpo.engines.torch.batch import DecodeBatch, Request
from grpo.engines.torch.sampling import RowSampler, uniforms
from grpo.types import SamplingParams
from grpo.weights.payload import load_weights

MAX_ROWS, MAX_PROMPT, MAX_COMPLETION = 6, 6, 20


def batch_of(model, stop_token_ids=(2, 3)):
    return DecodeBatch(
        model,
        stop_token_ids=stop_token_ids,
        limits=Limits(MAX_PROMPT, MAX_COMPLETION, MAX_ROWS),
    )


def random_request(rng):
    params = SamplingParams(
        n=int(rng.integers(1, 4)),
        temperature=float(rng.choice([0.0, 0.7, 1.4])),
        top_k=int(rng.choice([0, 5])),
        max_tokens=int(rng.integers(1, MAX_COMPLETION + 1)),
        stop_token_ids=tuple(range(10, 10 + int(rng.integers(3)))),
        seed=int(rng.integers(1000)),
    )
    return Request(prompt_of(int(rng.integers(1, MAX_PROMPT + 1)), seed=params.seed), params)


def assert_drawn_as_alone(models, request):
    """Every token is what its full prefix gives, under the weights of its version, with the numbers of its sample."""
    params = request.params
    for sample, completion in enumerate(request.result()):
        count = len(completion.token_ids)
        versions = np.repeat(*np.array(completion.versions).T)
        by_version = {v: full_logits(models[v], request.prompt_ids, completion.token_ids) for v in set(versions)}
        logits_TV = torch.stack([by_version[version][i] for i, version in enumerate(versions)])
        sampler = RowSampler([params] * count, torch.device("cpu"))
        tokens_T, logprobs_T = sampler.draw(logits_TV, uniforms(params.seed, sample, count))
        assert completion.token_ids.tolist() == tokens_T.tolist()
        np.testing.assert_allclose(completion.logprobs, logprobs_T, atol=1e-4)
        stops = {2, 3, *params.stop_token_ids}
        assert not stops & set(completion.token_ids[:-1].tolist())
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in stops else "length")
        assert completion.finish_reason == "stop" or count == params.max_tokens


@pytest.mark.parametrize("make_model", [grouped_query_llama, sliding_mistral])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_join_leave_are_aborted_and_see_new_weights_at_random(make_model, seed, monkeypatch):
    monkeypatch.setattr(batch_module, "_SLACK_COLUMNS", 2)
    rng = np.random.default_rng(seed)
    models = [make_model(seed=version + 1) for version in range(4)]
    batch = batch_of(make_model(seed=1))
    waiting, running, finished, aborted, sampled = [], [], [], 0, 0
    while len(finished) < 25:
        if rng.random() < 0.6:
            waiting += [random_request(rng) for _ in range(2)]
        joining, rows = [], batch.free_rows
        while waiting and rows > 0:
            joining.append(waiting.pop(0))
            rows -= joining[-1].to_join
        done, count = batch.step(joining)
        waiting = [request for request in joining if request.to_join] + waiting
        running = [request for request in dict.fromkeys(running + joining) if request not in done]
        finished += done
        sampled += count
        if running and rng.random() < 0.05:
            batch.abort(gone := running.pop(int(rng.integers(len(running)))))
            waiting = [request for request in waiting if request is not gone]
            aborted += 1
        if batch.version < 3 and len(finished) > 6 * (batch.version + 1):
            batch.version += 1
            load_weights(batch.model, weights_of(models[batch.version], batch.version))
            batch.recompute()
        assert batch.running == sum(request.joined - len(request.completions) for request in running)
    assert aborted
    assert batch.version == 3
    assert sampled >= sum(len(completion.token_ids) for request in finished for completion in request.result())
    for request in finished:
        assert_drawn_as_alone(models, request)


def test_a_step_without_rows_does_nothing():
    batch = batch_of(grouped_query_llama())
    batch.recompute()
    assert batch.step([]) == ([], 0)


def test_a_longest_prompt_joins_right_after_short_rows_moved_to_the_left(monkeypatch):
    monkeypatch.setattr(batch_module, "_SLACK_COLUMNS", 1)
    model = grouped_query_llama()
    batch = batch_of(model, stop_token_ids=())
    long, short, last = (Request(prompt_of(n), greedy(count)) for n, count in ((6, 20), (1, 8), (6, 5)))
    batch.step([long])
    for _ in range(17):
        batch.step([])
    batch.step([short])
    assert batch.step([])[0] == [long]  # the short one is alone now, near the right edge
    for _ in range(2):
        batch.step([])
    batch.step([last])
    while batch.running:
        batch.step([])
    for request in (long, short, last):
        tokens = request.result()[0].token_ids.tolist()
        assert tokens == greedy_tokens(model, request.prompt_ids, request.params.max_tokens)
