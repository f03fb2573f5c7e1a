import asyncio

import pytest
from engine_helpers import (
    at_forward,
    begin,
    begin_update,
    forward_shapes,
    greedy,
    greedy_tokens,
    llama,
    prompt_of,
    serving,
    weights_of,
)

# --- cancellation ---


async def test_cancelling_a_running_group_frees_its_rows():
    model, running = llama(), []
    async with serving(model, max_rows=4) as engine:

        async def cancel():
            running[0].cancel()

        at_forward(model, 3, cancel)
        running.append(await begin(engine.generate(prompt_of(4), greedy(40, n=4))))
        waiting = await begin(engine.generate(prompt_of(5), greedy(6, n=4)))
        group = await waiting
        assert running[0].cancelled()
        assert engine.stats().tokens == 4 * 3 + 4 * 6
    assert [completion.token_ids.tolist() for completion in group] == [greedy_tokens(model, prompt_of(5), 6)] * 4


async def test_cancelling_one_group_leaves_its_neighbours_alone():
    model, running = llama(), []
    async with serving(model) as engine:

        async def cancel():
            running[0].cancel()

        at_forward(model, 4, cancel)
        for length in (4, 7, 2):
            running.append(await begin(engine.generate(prompt_of(length), greedy(12, n=2))))
        results = await asyncio.gather(*running, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    for length, group in zip((7, 2), results[1:], strict=True):
        expected = greedy_tokens(model, prompt_of(length), 12)
        assert [completion.token_ids.tolist() for completion in group] == [expected, expected]


async def test_a_request_cancelled_while_it_waits_is_never_computed():
    model, running = llama(), []
    shapes = forward_shapes(model)
    async with serving(model, max_rows=1) as engine:

        async def cancel():
            running[1].cancel()

        at_forward(model, 2, cancel)
        for length in (4, 7, 2):
            running.append(await begin(engine.generate(prompt_of(length), greedy(5))))
        await asyncio.gather(*running, return_exceptions=True)
        assert engine.stats().tokens == 10
    assert (1, 7) not in shapes


# --- requests that can't be served ---


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
        (0, {}, "prompt_tokens=0"),
        (9, {}, "prompt_tokens=9 must be 1 to 8"),
        (4, {"n": 5}, "n=5"),
        (4, {"n": 0}, "n=0"),
        (4, {"count": 41}, "max_tokens=41 must be 1 to 40"),
        (4, {"count": 0}, "max_tokens=0"),
    ],
)
async def test_a_bad_request_is_refused_and_the_engine_goes_on(length, settings, message):
    model = llama()
    async with serving(model, max_rows=4) as engine:
        running = await begin(engine.generate(prompt_of(3), greedy(6)))
        with pytest.raises(ValueError, match=message):
            await engine.generate(prompt_of(length), greedy(**{"count": 4, **settings}))
        (completion,) = await running
        (later,) = await engine.generate(prompt_of(5), greedy(6))
    assert completion.token_ids.tolist() == greedy_tokens(model, prompt_of(3), 6)
    assert later.token_ids.tolist() == greedy_tokens(model, prompt_of(5), 6)


# --- the end ---


async def test_closing_raises_at_every_pending_call():
    model, pending, reached = llama(), [], asyncio.Event()
    async with serving(model, max_rows=1, weight_update="drain") as engine:

        async def update():
            pending.append(await begin_update(engine, weights_of(llama(seed=2), 1)))
            reached.set()

        at_forward(model, 2, update)
        pending += [await begin(engine.generate(prompt_of(4), greedy(40))) for _ in range(2)]
        await reached.wait()
        await engine.close()
        for call in pending:
            with pytest.raises(RuntimeError, match="the engine was closed"):
                await call


async def test_a_closed_engine_takes_nothing_more():
    async with serving(llama()) as engine:
        await engine.generate(prompt_of(4), greedy(2))
        await engine.close()
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await engine.generate(prompt_of(4), greedy(2))
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await engine.update_weights(weights_of(llama(), 1))
        await engine.close()  # a second time is no error


async def test_an_idle_engine_closes_at_once():
    async with serving(llama()) as engine:
        assert engine.stats().tokens == 0


async def test_an_error_inside_a_step_reaches_every_waiting_call():
    model, pending, begun = llama(), [], asyncio.Event()

    async def fail():
        await begun.wait()
        raise ZeroDivisionError("inside the model")

    async with serving(model, max_rows=1, weight_update="drain") as engine:
        at_forward(model, 3, fail)
        pending += [await begin(engine.generate(prompt_of(4), greedy(40))) for _ in range(3)]
        pending.append(await begin_update(engine, weights_of(llama(seed=2), 1)))
        begun.set()
        for call in pending:
            with pytest.raises(ZeroDivisionError, match="inside the model"):
                await call
        with pytest.raises(RuntimeError, match="the engine has stopped") as raised:
            await engine.generate(prompt_of(4), greedy(2))
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        await engine.close()  # the error has been told to those who waited


# --- counters ---


async def test_tokens_and_busy_time_are_counted():
    async with serving(llama()) as engine:
        assert engine.stats().busy_s == 0
        await asyncio.gather(*(engine.generate(prompt_of(4, i), greedy(5, n=2)) for i in range(3)))
        assert engine.stats().tokens == 30
        assert engine.stats().busy_s > 0
