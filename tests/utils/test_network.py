"""Processes of other machines find this one: it listens where they come from."""

import os
import socket
import subprocess
import sys

import pytest

from grpo.services.endpoint import free_port
from grpo.utils.network import address_towards, interface_of

ELSEWHERE = "192.0.2.1"  # an address of nobody

JOINED = """if True:
    import os, sys
    from grpo.utils.ranks import Ranks, join, leave

    host, port = sys.argv[1], int(sys.argv[2])
    join(Ranks.alone(), (host, port), "cpu", 30.0)
    own = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)}
    for _, here, _, state, *_, inode in (line.split()[:10] for line in open("/proc/net/tcp")):
        address, _, at = here.partition(":")
        if state == "0A" and f"socket:[{inode}]" in own and int(at, 16) != port:  # there rank 0 waits for the others
            print(".".join(str(byte) for byte in reversed(bytes.fromhex(address))))
    leave()
"""


@pytest.fixture
def own_address():
    try:
        return address_towards(ELSEWHERE, 9)
    except OSError:
        pytest.skip("this machine has no network")


def test_the_address_towards_itself_is_its_own(own_address):
    assert address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert address_towards(own_address, 9) == own_address


def test_an_interface_is_found_by_its_address(own_address):
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of(own_address) in {name for _, name in socket.if_nameindex()} - {"lo"}
    assert interface_of(ELSEWHERE) is None
    assert interface_of("::1") is None


@pytest.mark.parametrize("named", [None, "lo"])
def test_a_rank_listens_where_the_way_to_rank_0_begins_unless_another_network_is_named(own_address, named):
    environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    if named is not None:
        environment["GLOO_SOCKET_IFNAME"] = named
    command = [sys.executable, "-c", JOINED, own_address, str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [own_address if named is None else "127.0.0.1"]
