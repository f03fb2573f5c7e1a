"""Script: print what answers at the address of a Ray cluster, as one line of JSON.

It runs in a separate process: Ray's client retries for minutes, writes to stderr meanwhile, and ends its process when a
token is required and none is set.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

_TIMEOUT_S = 5  # for the connection, and for the answer
_ALIVE = 0  # GcsNodeInfo.GcsNodeState
_TOKEN_FIX = (
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=..., or put it into ~/.ray/auth_token; `ray get-auth-token` prints it "
    "on the node where the cluster was started"
)


def probe(address: str) -> dict[str, Any]:
    """Return `nodes`, the resources of each node; or an `error` with its fix."""
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.exceptions import AuthenticationError, RayError

    try:
        # Connect by hand first: the client does not say that a port is closed.
        resolved = services.canonicalize_bootstrap_address_or_die(address)
        host, _, port = resolved.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_S).close()
        if address == "auto":  # then, as in ray.init, a token that is set is used unasked
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        tokens.ensure_token_if_auth_enabled(create_token_if_missing=False)
        # The alarm ends this process if no Ray answers; the rest takes as long as this machine has processes.
        signal.alarm(_TIMEOUT_S)
        client = GcsClient(address=resolved)
        nodes = {id.hex(): node for id, node in client.get_all_node_info().items() if node.state == _ALIVE}
        signal.alarm(0)
    except AuthenticationError:
        return {"error": f"the cluster at {address} {_token_problem(os.environ, tokens)}: {_TOKEN_FIX}"}
    except ConnectionError as error:  # also of a port that is closed
        return {"error": f"no Ray cluster at {address}: {_first_line(error)}; {_start_fix(address)}"}
    except (OSError, RayError, RuntimeError, ValueError) as error:
        return {"error": f"can't reach Ray at {address}: {_first_line(error)}; {_start_fix(address)}"}
    if not services.find_node_ids() & set(nodes):
        return {
            "error": f"no node of the cluster at {address} runs on this machine, and a run's driver needs one: "
            f"`ray start --address={address}` here, or start the run on a node (docs/clusters.md)"
        }
    return {"nodes": [dict(node.resources_total) for node in nodes.values()]}


def _token_problem(environment: Mapping[str, str], tokens: Any) -> str:
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return "requires a token, and token authentication is off here"
    is_set = tokens.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    return "requires another token than the one set here" if is_set else "requires a token, and none is set here"


def _start_fix(address: str) -> str:
    return "`ray start --head` starts one" if address == "auto" else "is it HOST:PORT of `ray start --head`?"


def _first_line(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (reason.strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])), flush=True)
    os._exit(0)  # without waiting for Ray's threads
