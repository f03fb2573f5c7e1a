"""Pool of processes for code that may hang, crash or exhaust memory.

Each process has its own pipe and shares nothing else, so the failure of one does not affect the others.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import Pipe
from threading import Lock, Timer
from typing import Any, Generic, TypeVar

from grpo.errors import RewardCrash, RewardError, RewardMemory, RewardTimeout
from grpo.telemetry.recording import span

# Not a child of `multiprocessing`: it would import the parent's main module (Ray, in an actor), and user code could not
# start processes.
_COMMAND = "import sys; sys.path[:] = sys.argv[2:]; from grpo.rewards.pool_worker import serve; serve(sys.argv[1])"
_DYING_S = 1.0  # for a process to end after its pipe has closed
_BUILD_S = 600.0  # for a process to import and build what it runs
_PIPE_CAPACITY = 1 << 15  # bytes that can be sent to a process that does not read
T = TypeVar("T")


class ProcessPool(Generic[T]):
    """Call a function in one of `workers` processes, with a limit of `timeout_s` seconds and `memory_gb` GiB (0: none).

    `build(*args)` runs once in each process and returns the function. The function gets `set_label`, which names the
    current work in errors, before the arguments of the call. A process that hangs or dies is replaced, and processes
    that it started are killed with it. All processes end with `close`. On Linux they also end with this process, except
    that a SIGKILL can leave behind those that user code started.

    Example:
        def build(factor: int) -> Callable[..., int]:
            def multiply(set_label: Callable[[str], None], number: int) -> int:
                set_label(f"multiplication of {number}")
                return factor * number
            return multiply

        pool = ProcessPool(build, (2,), workers=4, timeout_s=10.0)
        await pool.start()
        assert await pool.call(21) == 42
        await pool.close()
    """

    def __init__(
        self,
        build: Callable[..., Callable[..., T]],
        args: tuple[Any, ...],
        *,
        workers: int,
        timeout_s: float,
        memory_gb: float = 0.0,
    ) -> None:
        self._new_worker = partial(_Worker, pickle.dumps((build, args, memory_gb)), timeout_s)
        self._workers: set[_Worker] = {self._new_worker() for _ in range(workers)}
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        # Threads live until `close`: the kernel kills a process when the thread that started it ends.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="process-pool")
        self._closed = False

    async def start(self) -> None:
        """Start the processes. Raises the exceptions of `build`, and RewardCrash if a process dies in it."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.gather(*(loop.run_in_executor(self._threads, worker.start) for worker in self._workers))
        except BaseException:
            await self.close()
            raise
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def call(self, *args: Any) -> T:
        """Return the function's result. Cancelling the call kills its process.

        The time limit excludes waiting for a free process. The call is repeated once if something else kills the
        process with SIGKILL. Raises RewardTimeout, and RewardCrash if the process dies. An exception of the function
        arrives with its traceback as a note, as a RewardError if its class may be unknown here.
        """
        try:
            return await self._call(args)
        except _Killed:  # by the kernel when the machine is out of memory, for example; not the function's fault
            return await self._call(args)

    async def _call(self, args: tuple[Any, ...]) -> T:
        worker = await self._idle.get()
        if self._closed:
            self._idle.put_nowait(worker)  # wakes the next caller
            raise RewardCrash("the reward processes are closed")
        running = asyncio.get_running_loop().run_in_executor(self._threads, worker.call, args)
        running.add_done_callback(partial(self._give_back, worker))
        try:
            with span("score"):
                return await asyncio.shield(running)
        except asyncio.CancelledError:
            if not running.done():  # or the next call may already use the process
                worker.kill()
            raise

    async def close(self) -> None:
        """Kill the processes. Pending calls raise RewardCrash."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        await asyncio.to_thread(self._threads.shutdown)
        for worker in self._workers:
            worker.clean_up()

    def _give_back(self, worker: _Worker, call: asyncio.Future[T]) -> None:
        if not call.cancelled():
            call.exception()  # marks it as retrieved: a cancelled caller does not
        if worker.killed and not self._closed:
            self._workers.remove(worker)
            self._threads.submit(worker.clean_up)
            worker = self._new_worker()  # its first call starts it
            self._workers.add(worker)
        self._idle.put_nowait(worker)


class _Worker:
    """One process, started by its first call. Only `kill` may be called while another method runs."""

    def __init__(self, setup: bytes, timeout_s: float) -> None:
        self._setup, self._timeout_s = setup, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self.killed = False

    def start(self) -> None:
        """Start the process and build the function. Raises the exceptions of `build`."""
        self._pipe, worker_end = Pipe()
        with worker_end, self._lock:
            if self.killed:
                raise RewardCrash("its process was killed")
            # -u: output of user code is not lost when the process is killed
            command = [sys.executable, "-u", "-c", _COMMAND, f"{worker_end.fileno()},{os.getpid()}", *sys.path]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[worker_end.fileno()], start_new_session=True
            )
        try:
            self._ask(self._setup, _BUILD_S)
        except BaseException:
            self.kill()
            self.clean_up()
            raise

    def call(self, args: tuple[Any, ...]) -> Any:
        try:
            request = pickle.dumps(args)
        except Exception as error:  # its type depends on the arguments
            raise RewardError(f"a problem that can't be pickled for another process: {error}") from error
        if self._process is None or self._process.poll() is not None:  # new, or killed while idle
            self.clean_up()
            self.start()
        try:
            return self._ask(request, self._timeout_s)
        except RewardMemory:
            self._end()  # it may still hold the memory
            raise

    def kill(self) -> None:
        """Kill the process and those that it started, without waiting."""
        with self._lock, suppress(ProcessLookupError):
            self.killed = True
            if self._process is not None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def clean_up(self) -> None:
        """Release the resources of a process that has ended."""
        if self._process is not None:
            self._process.wait()
            self._pipe.close()
            with self._lock:
                self._process = None

    def _ask(self, request: bytes, timeout_s: float) -> Any:
        """Return the answer. Raises the function's exception, RewardTimeout or RewardCrash."""
        deadline = time.monotonic() + timeout_s
        kind, label = "label", "a reward process"
        try:
            with self._killed_at(deadline) if len(request) > _PIPE_CAPACITY else nullcontext():
                self._pipe.send_bytes(request)
            while kind == "label" and self._pipe.poll(max(0.0, deadline - time.monotonic())):
                kind, value = self._pipe.recv()
                label = value if kind == "label" else label
        except (EOFError, OSError) as error:
            if time.monotonic() < deadline:
                killed_here, code = self.killed, self._end(_DYING_S)
                crash = _Killed if code == -signal.SIGKILL and not killed_here else RewardCrash
                raise crash(f"{label}: its process died with {_describe(code)}") from error
        if kind == "label":
            self._end()
            raise RewardTimeout(f"{label}: took longer than {timeout_s:g} s and was killed")
        if kind == "raised":
            raise value
        return value

    def _end(self, patience_s: float = 0.0) -> int:
        """Wait `patience_s` for the process to end, then kill it. Return its exit code as subprocess does."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self.kill()
        code = self._process.wait()
        self.clean_up()
        return code

    @contextmanager
    def _killed_at(self, deadline: float) -> Iterator[None]:
        """Kill the process if the block runs past the deadline: it may not read the request."""
        timer = Timer(deadline - time.monotonic(), self.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _Killed(RewardCrash):
    """Death by SIGKILL from outside."""


def _describe(code: int) -> str:
    return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
