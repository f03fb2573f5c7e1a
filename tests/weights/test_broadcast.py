"""Senders and receivers of one process, over gloo: each has threads and connections of its own."""

import asyncio
from itertools import count

import numpy as np
import pytest
import torch

from grpo.errors import TransferError
from grpo.services.endpoint import free_port
from grpo.weights.broadcast import Broadcaster, BroadcastGroup
from grpo.weights.flat_buffer import buffer_checksum, lay_out
from grpo.weights.payload import Weights

NUMBERS = count()


def group_of(receivers, *, bucket_bytes=1000, timeout_s=20.0):
    return BroadcastGroup(next(NUMBERS), "127.0.0.1", free_port(), receivers, "gloo", bucket_bytes, timeout_s)


def weights_of(nbytes, version=1):
    buffer = np.random.default_rng(version).integers(0, 256, nbytes, dtype=np.uint8)
    return Weights(version, specs_of(nbytes), buffer, buffer_checksum(buffer))


def specs_of(nbytes):
    """One tensor that has so many bytes."""
    return lay_out([("w", (nbytes,), torch.uint8)])


@pytest.fixture
def broadcasters():
    """A sender and three receivers."""
    made = []

    def make():
        made.extend(Broadcaster() for _ in range(4))
        return made[0], made[1:]

    yield make
    for each in made:
        each.leave()


async def transfer(sender, receivers, group, weights):
    _, *received = await asyncio.gather(
        sender.send(group, weights), *(receiver.receive(group, weights.header) for receiver in receivers)
    )
    return received


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 1001, 123_456])
async def test_every_receiver_has_the_very_bytes(broadcasters, nbytes):
    sender, receivers = broadcasters()
    weights = weights_of(nbytes)
    for each in await transfer(sender, receivers, group_of(3), weights):
        assert each.version == 1
        assert each.specs == weights.specs
        assert each.checksum == buffer_checksum(each.buffer[:nbytes])
        np.testing.assert_array_equal(each.buffer[:nbytes], weights.buffer)


async def test_what_arrived_is_nobody_elses_and_is_not_written_to_again(broadcasters):
    sender, receivers = broadcasters()
    group = group_of(3)
    first = await transfer(sender, receivers, group, weights_of(5000, version=1))
    await transfer(sender, receivers, group, weights_of(5000, version=2))
    for each in first:
        assert not each.buffer.flags.writeable
        np.testing.assert_array_equal(each.buffer[:5000], weights_of(5000, version=1).buffer)


async def test_another_group_may_have_other_members(broadcasters):
    sender, receivers = broadcasters()
    await transfer(sender, receivers, group_of(3), weights_of(5000))
    (received,) = await transfer(sender, receivers[1:2], group_of(1), weights_of(5000, version=2))
    assert received.version == 2


async def test_the_network_is_the_one_that_is_named(broadcasters, monkeypatch):
    sender, receivers = broadcasters()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert len(await transfer(sender, receivers, group_of(3), weights_of(5000))) == 3
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    with pytest.raises(TransferError, match="none0"):
        await sender.send(group_of(0), weights_of(5000))


async def test_one_receiver_too_many_is_told(broadcasters):
    sender, receivers = broadcasters()
    results = await asyncio.gather(
        sender.send(group := group_of(2), weights_of(5000)),
        *(receiver.receive(group, weights_of(5000).header) for receiver in receivers),
        return_exceptions=True,
    )
    (error,) = (result for result in results if isinstance(result, Exception))
    assert isinstance(error, TransferError)
    assert "no room for one more" in str(error)


async def test_who_waits_for_one_that_never_comes_raises_within_the_time_out(broadcasters):
    sender, receivers = broadcasters()
    group = group_of(2, timeout_s=0.5)
    results = await asyncio.gather(
        sender.send(group, weights_of(5000)),
        receivers[0].receive(group, weights_of(5000).header),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [TransferError, TransferError]


async def test_who_leaves_waits_no_longer(broadcasters):
    """Also while the thread that talks to the others goes on waiting for one that never comes."""
    sender, (receiver, *_) = broadcasters()
    group = group_of(2, timeout_s=3.0)
    calls = [
        asyncio.ensure_future(sender.send(group, weights_of(5000))),
        asyncio.ensure_future(receiver.receive(group, weights_of(5000).header)),
    ]
    await asyncio.wait(calls, timeout=0.2)
    assert not any(call.done() for call in calls)
    for each in (sender, receiver):
        each.leave()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(result) for result in results] == ["the group was left during a transfer"] * 2


async def test_calls_of_a_group_that_was_left_or_is_older_are_refused(broadcasters):
    """They may arrive late."""
    sender, (receiver, *_) = broadcasters()
    old, new = group_of(1), group_of(1)
    receiver.leave(old.number)
    with pytest.raises(TransferError, match="was left before"):
        await receiver.receive(old, weights_of(5000).header)
    await transfer(sender, [receiver], new, weights_of(5000))
    receiver.leave(old.number)
    (received,) = await transfer(sender, [receiver], new, weights_of(5000, version=2))
    assert received.version == 2


async def test_when_one_leaves_in_the_middle_the_others_hear_of_it(broadcasters):
    sender, receivers = broadcasters()
    group = group_of(3, bucket_bytes=1_000_000, timeout_s=3.0)
    await transfer(sender, receivers, group, weights_of(5000))
    receivers[2].leave()
    results = await asyncio.gather(
        sender.send(group, weights_of(50_000_000)),
        *(receiver.receive(group, weights_of(50_000_000).header) for receiver in receivers[:2]),
        return_exceptions=True,
    )
    assert any(isinstance(result, TransferError) for result in results)


async def test_a_cancelled_call_leaves_the_place_usable_by_another_group(broadcasters):
    sender, receivers = broadcasters()
    call = asyncio.ensure_future(sender.send(group_of(3, timeout_s=1.0), weights_of(5000)))
    await asyncio.wait([call], timeout=0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert len(await transfer(sender, receivers, group_of(3), weights_of(5000))) == 3
