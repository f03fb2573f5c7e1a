"""A script: what stands at the address of a Ray cluster, as one line of JSON.

In a process of its own since Ray's client retries for minutes, writes to stderr meanwhile, and ends the process where a
token is asked for and there is none.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

_PATIENCE_S = 5  # with each of: a connection, an answer
_ALIVE = 0  # GcsNodeInfo.GcsNodeState
_TOKEN = (
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=..., or put it into ~/.ray/auth_token; `ray get-auth-token` prints it "
    "on the node where the cluster was started"
)


def probe(address: str) -> dict[str, Any]:
    """`nodes`: the resources of each; or an `error`, which says what to do."""
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.exceptions import AuthenticationError, RayError

    try:
        there = services.canonicalize_bootstrap_address_or_die(address)
        host, _, port = there.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
        if address == "auto":  # then, as in ray.init, a token that is there is used unasked
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        tokens.ensure_token_if_auth_enabled(create_token_if_missing=False)
        signal.alarm(_PATIENCE_S)
        client = GcsClient(address=there)
        nodes = {id.hex(): node for id, node in client.get_all_node_info().items() if node.state == _ALIVE}
        signal.alarm(0)  # what is left to do takes as long as this machine has processes
    except AuthenticationError:
        return {"error": f"the cluster at {address} {_token_problem(os.environ, tokens)}: {_TOKEN}"}
    except ConnectionError as error:  # also of a port that is closed
        return {"error": f"no Ray cluster at {address}: {_first_line(error)}; {_start(address)}"}
    except (OSError, RayError, RuntimeError, ValueError) as error:
        return {"error": f"can't reach Ray at {address}: {_first_line(error)}; {_start(address)}"}
    if not services.find_node_ids() & set(nodes):
        return {
            "error": f"no node of the cluster at {address} runs on this machine, and a run's driver needs one: "
            f"`ray start --address={address}` here, or run it there (docs/clusters.md)"
        }
    return {"nodes": [dict(node.resources_total) for node in nodes.values()]}


def _token_problem(environment: Mapping[str, str], tokens: Any) -> str:
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return "asks for a token, which is not used here"
    there = tokens.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    return "has another token than the one here" if there else "asks for a token, and there is none here"


def _start(address: str) -> str:
    return "`ray start --head` starts one" if address == "auto" else "is it HOST:PORT of `ray start --head`?"


def _first_line(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (reason.strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])), flush=True)
    os._exit(0)  # Ray's threads have nothing to say any more
