"""The half of killable.py that runs in the processes. Imports little: they start fast and stay small."""

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
    """Answer one request after another until the parent is gone: `addresses` is the pipe's descriptor and its pid."""
    descriptor, parent = map(int, addresses.split(","))
    _die_with(parent)
    os.set_inheritable(descriptor, False)  # else the programs that user code starts would keep the pipe open
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
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send(_answer(partial(function, lambda words: pipe.send(("doing", words))), request))


def _answer(function: Callable[..., Any], request: bytes) -> tuple[str, Any]:
    try:
        args = pickle.loads(request)
    except Exception as error:  # of a type that depends on what is in there
        return "raised", _sendable(RewardError(f"a problem that can't be read in another process: {error}"))
    try:
        return "returned", function(*args)
    except BaseException as error:
        return "raised", _sendable(error)


def _sendable(error: BaseException) -> BaseException:
    """The error with its traceback as a note. Retold as a RewardError where the parent may not know its class."""
    told, trace = error, "".join(traceback.format_exception(error))
    try:
        known = isinstance(error, Exception) and type(error).__module__ in (GRPOError.__module__, "builtins")
        pickle.dumps(error)
    except Exception:  # of a type that depends on what the error holds
        known = False
    if not known:
        told = RewardError(f"{type(error).__name__}: {error}")
    told.add_note(trace)
    return told


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent is gone, however it went and whatever runs here."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it went before the line above


def _limit_memory(memory_gb: float) -> None:
    """Memory beyond what is in use now; what asks for more gets a MemoryError, where it checks for one."""
    if memory_gb > 0 and sys.platform == "linux":
        import resource

        with open("/proc/self/status") as status:
            used_kb = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = used_kb * 1024 + round(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if most < 0 else min(limit, most), most))
