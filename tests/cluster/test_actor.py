"""Real Ray, with an actor that shows what arrives; and copies of payloads, without Ray."""

import asyncio
import os
import signal

import numpy as np
import pytest
import ray

from grpo.cluster.actor import LatestCopy, RayEndpoint, _Host, host_class, name_of
from grpo.errors import ActorDied, RewardError
from grpo.services.handle import ActorHandle
from tests.fakes import Parcel, Worker, service_of

real_ray = pytest.mark.usefixtures("ray_session")


def process():
    return RayEndpoint("worker", Worker, host_class(Worker).options(num_cpus=0).remote("worker", name_of(Worker), {}))


@pytest.fixture(scope="module")
def long_lived(ray_session):
    """A process for all tests that let it live: one takes seconds to start."""
    endpoint = process()
    yield endpoint
    endpoint.kill()


@pytest.fixture
async def worker(long_lived):
    return ActorHandle(service_of(long_lived, name="worker"))


async def test_other_programs_on_the_machine_have_no_priority_over_an_actor(long_lived):
    await long_lived.wait_scheduled()
    assert os.getpriority(os.PRIO_PROCESS, long_lived.pid) == os.getpriority(os.PRIO_PROCESS, 0)


async def test_a_payload_stays_behind_and_is_resolved_where_it_is_used(worker):
    payload, report = await worker.make.call_one(1000)
    assert isinstance(payload, ray.ObjectRef)
    assert report == {"size": 1000}
    assert await worker.total.call_one(payload) == 499500
    assert await worker.total.call_one(array=payload, times=2) == 999000


async def test_a_payload_in_a_field_of_a_dataclass_is_resolved_too(worker):
    payload, _ = await worker.make.call_one(10)
    assert await worker.open.call_one(Parcel("box", payload)) == ("box", "ndarray", 45)


async def test_payloads_in_a_tuple_are_resolved_too(worker):
    payloads = tuple([(await worker.make.call_one(size))[0] for size in (10, 5)])
    assert await worker.totals.call_one(payloads) == [45, 10]


async def test_a_process_can_be_waited_for_at_an_address_of_its_node(long_lived):
    host, port = await long_lived.rendezvous()
    assert host == ray.util.get_node_ip_address()
    assert 0 < port < 1 << 16


async def test_an_actor_needs_neither_setup_nor_close(long_lived):
    assert not hasattr(Worker, "setup")
    assert not hasattr(Worker, "close")
    assert [await long_lived.call(method) for method in ("setup", "close")] == [[None], [None]]


async def test_what_was_never_set_up_has_nothing_to_close():
    host = _Host("worker", "tests.fakes:MeetingRank", {"unknown": "argument"})
    assert await host.invoke(("close", (), {})) is None
    with pytest.raises(TypeError):
        await host.invoke(("setup", (), {}))


async def test_an_exception_arrives_with_its_type(worker):
    with pytest.raises(RewardError, match="reward 'x' failed") as caught:
        await worker.fail.call_one()
    assert type(caught.value) is RewardError


async def test_calls_that_travel_together_bring_their_payloads_and_get_their_own_answers(worker):
    payload, _ = await worker.make.call_one(10)
    labels = [f"box {i}" for i in range(5)]
    scores = (worker.score.call_one(Parcel(label, payload)) for label in labels)
    wrong = worker.score.call_one(Parcel("the wrong one", payload), right=False)
    *answers, error = await asyncio.gather(*scores, wrong, return_exceptions=True)
    assert answers == [(label, 45) for label in labels]
    assert type(error) is RewardError
    assert "the wrong one is not right" in str(error)


@real_ray
async def test_a_dead_process_is_an_error_of_its_own():
    endpoint = process()
    hears_of_it = asyncio.ensure_future(endpoint.wait_dead())
    with pytest.raises(ActorDied, match="worker"):
        await endpoint.invoke("die")
    gathered = endpoint.invoke("score", (Parcel("box", np.ones(1)),))
    for call in (hears_of_it, endpoint.invoke("total", (np.ones(1),)), gathered, endpoint.ping()):
        with pytest.raises(ActorDied):
            await call


@real_ray
async def test_a_process_that_no_longer_answers_can_be_killed():
    endpoint = process()
    await endpoint.wait_scheduled()
    await endpoint.ping()
    os.kill(endpoint.pid, signal.SIGSTOP)
    waiting = asyncio.ensure_future(endpoint.invoke("process"))
    endpoint.kill(hung=True)
    with pytest.raises(ActorDied):
        await waiting


async def test_replicas_are_processes_of_their_own(long_lived):
    other = process()
    handle = ActorHandle(service_of(long_lived, other, name="worker"))
    assert len(set(await handle.process.fanout())) == 2
    assert len(await asyncio.gather(*(handle.process.route() for _ in range(4)))) == 4
    other.kill()


def test_rays_dashboard_and_logs_call_a_process_by_its_name():
    assert repr(_Host("generator-1", name_of(Worker), {})) == "generator-1"


class Payloads:
    """Made by number; each arrives when the test says so."""

    def __init__(self):
        self.asked, self._arrivals = [], {}

    async def make(self, number):
        self.asked.append(number)
        self._arrivals[number] = asyncio.get_running_loop().create_future()
        return await self._arrivals[number]

    async def arrive(self, number, error=None):
        arrival = self._arrivals[number]
        arrival.set_exception(error) if error else arrival.set_result(f"copy {number}")
        for _ in range(5):
            await asyncio.sleep(0)


class Later:
    """What starts only when it is awaited, as a reference does, and may be let go before."""

    def __init__(self, payloads, number):
        self._payloads, self._number = payloads, number

    def __await__(self):
        return self._payloads.make(self._number).__await__()


@pytest.fixture
def payloads():
    return Payloads()


@pytest.fixture
def bring(payloads):
    """Brings payloads by their numbers, through one copy that `bring.copy` is."""

    async def bring(*numbers):
        for number in numbers:
            bring.copy.fetch(Later(payloads, number))
        await asyncio.sleep(0)

    bring.copy = LatestCopy("maker.make")
    return bring


async def test_a_copy_is_held_until_the_next_is_here(bring, payloads):
    await bring(1)
    assert bring.copy.held is None
    await payloads.arrive(1)
    assert bring.copy.held == "copy 1"
    await bring(2)
    assert bring.copy.held == "copy 1"
    await payloads.arrive(2)
    assert bring.copy.held == "copy 2"


async def test_one_copy_is_under_way_and_the_newest_of_those_that_wait_is_the_next(bring, payloads):
    await bring(1, 2, 3, 4)
    assert payloads.asked == [1]
    await payloads.arrive(1)
    assert payloads.asked == [1, 4]
    await bring(5)
    await payloads.arrive(4)
    await payloads.arrive(5)
    assert (payloads.asked, bring.copy.held) == ([1, 4, 5], "copy 5")


async def test_a_payload_that_does_not_arrive_is_told_of_and_the_next_one_comes(bring, payloads, caplog):
    await bring(1)
    await payloads.arrive(1)
    await bring(2, 3)
    await payloads.arrive(2, OSError("gone"))
    assert (bring.copy.held, caplog.messages) == ("copy 1", ["maker.make: no copy on the driver's node: gone"])
    await payloads.arrive(3)
    assert bring.copy.held == "copy 3"


async def test_the_end_of_the_event_loop_is_no_failure(bring, payloads, caplog):
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    others = asyncio.all_tasks()
    await bring(1, 2)
    for task in asyncio.all_tasks() - others:
        task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (payloads.asked, errors, caplog.messages) == ([1], [], [])
