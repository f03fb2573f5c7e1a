"""Worker side of process_pool.py. It imports little, so that the processes start fast and stay small."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from grpo.errors import GRPOError, RewardError

_PR_SET_PDEATHSIG = 1


def serve(addresses: str) -> None:
    """Answer requests until the parent is gone. `addresses` is the pipe's file descriptor and the parent's pid."""
    descriptor, parent = map(int, addresses.split(","))
    _die_with(parent)
    os.set_inheritable(descriptor, False)  # or programs that user code starts would keep the pipe open
    pipe = Connection(descriptor)
    sys.argv[1:] = []
    try:
        build, args, memory_gb = pickle.loads(pipe.recv_bytes())
        function = build(*args)
        _limit_memory(memory_gb)
    except BaseException as error:
        pipe.send(("raised", _sendable(error)))
        return
    pipe.send(("returned", None))

    def set_label(label: str) -> None:
        pipe.send(("label", label))

    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send(_answer(partial(function, set_label), request))


def _answer(function: Callable[..., Any], request: bytes) -> tuple[str, Any]:
    try:
        args = pickle.loads(request)
    except Exception as error:  # its type depends on the arguments
        return "raised", _sendable(RewardError(f"a problem that another process can't unpickle: {error}"))
    try:
        return "returned", function(*args)
    except BaseException as error:
        return "raised", _sendable(error)


def _sendable(error: BaseException) -> BaseException:
    """Return the error, or a RewardError if the parent may not know its class, with the traceback as a note."""
    sendable, trace = error, "".join(traceback.format_exception(error))
    try:
        known = isinstance(error, Exception) and type(error).__module__ in (GRPOError.__module__, "builtins")
        pickle.dumps(error)
    except Exception:  # its type depends on what the error holds
        known = False
    if not known:
        sendable = RewardError(f"{type(error).__name__}: {error}")
    sendable.add_note(trace)
    return sendable


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends in any way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before prctl


def _limit_memory(memory_gb: float) -> None:
    """Limit memory to `memory_gb` GiB more than is in use; larger allocations fail, mostly with a MemoryError."""
    if memory_gb > 0 and sys.platform == "linux":
        import resource

        with open("/proc/self/status") as status:
            used_kb = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        limit = used_kb * 1024 + round(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard_limit < 0 else min(limit, hard_limit), hard_limit))
