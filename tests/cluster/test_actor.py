"""Real Ray, with an actor that shows what arrives."""

import asyncio
import os
import signal

import numpy as np
import pytest
import ray

from grpo.cluster.actor import RayEndpoint, _Host, host_class, name_of
from grpo.errors import ActorDied, RewardError
from grpo.services.handle import ActorHandle
from tests.fakes import Parcel, Worker, service_of

pytestmark = pytest.mark.usefixtures("ray_session")


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


async def test_a_dead_process_is_an_error_of_its_own():
    endpoint = process()
    hears_of_it = asyncio.ensure_future(endpoint.wait_dead())
    with pytest.raises(ActorDied, match="worker"):
        await endpoint.invoke("die")
    gathered = endpoint.invoke("score", (Parcel("box", np.ones(1)),))
    for call in (hears_of_it, endpoint.invoke("total", (np.ones(1),)), gathered, endpoint.ping()):
        with pytest.raises(ActorDied):
            await call


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
