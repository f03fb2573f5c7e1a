import asyncio

import pytest

from grpo.cluster.handles import ActorHandle, LocalEndpoint


class Echo:
    def __init__(self, name):
        self.name, self.gate = name, asyncio.Event()

    async def say(self, word):
        return f"{self.name}: {word}"

    async def wait(self):
        await self.gate.wait()
        return self.name

    async def fail(self):
        raise KeyError(self.name)


def make(*names):
    echoes = [Echo(name) for name in names]
    return ActorHandle("echo", [LocalEndpoint(echo) for echo in echoes]), echoes


async def test_call_one_reaches_the_only_process():
    handle, _ = make("a")
    assert await handle.say.call_one("hi") == "a: hi"


async def test_call_one_refuses_a_service_of_several():
    handle, _ = make("a", "b")
    with pytest.raises(TypeError, match="echo has 2 processes"):
        await handle.say.call_one("hi")


async def test_call_and_fanout_reach_all_in_order():
    handle, _ = make("a", "b", "c")
    assert await handle.say.call("hi") == ["a: hi", "b: hi", "c: hi"]
    assert await handle.say.fanout(word="hi") == ["a: hi", "b: hi", "c: hi"]


async def test_route_takes_the_replica_with_the_fewest_calls_under_way():
    handle, echoes = make("a", "b")
    first, second = (asyncio.ensure_future(handle.wait.route()) for _ in range(2))
    await asyncio.sleep(0)
    assert handle.in_flight == [1, 1]
    echoes[1].gate.set()
    assert await second == "b"
    assert await handle.say.route("hi") == "b: hi"
    echoes[0].gate.set()
    assert await first == "a"
    assert handle.in_flight == [0, 0]


async def test_an_exception_is_raised_at_the_await_and_the_call_is_over():
    handle, _ = make("a", "b")
    with pytest.raises(KeyError):
        await handle.fail.route()
    with pytest.raises(KeyError):
        await handle.fail.fanout()
    assert handle.in_flight == [0, 0]
