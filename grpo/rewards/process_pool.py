"""Code that may hang, crash or eat all memory, in processes that can be killed.

One pipe per process and nothing shared: whatever happens to one, the others go on.
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

# No child of `multiprocessing`: that would import this process' main module (Ray, where an actor starts the process)
# and would not let user code have processes of its own.
_COMMAND = "import sys; sys.path[:] = sys.argv[2:]; from grpo.rewards.pool_worker import serve; serve(sys.argv[1])"
_DYING_S = 1.0
_BUILD_S = 600.0  # for a process to import and build what it runs
_SURELY_SENT = 1 << 15  # bytes that fit into the pipe, whatever the process at its end does
T = TypeVar("T")


class ProcessPool(Generic[T]):
    """Calls a function in one of `workers` processes, each call for at most `timeout_s` seconds.

    `build(*args)`, run once in each process, returns the function. It is called with `doing`, a function that takes
    the words under which errors name what comes next, and the arguments of the call. A process that hangs or dies is
    replaced, and it takes along those it has started. All end with `close`, and (on Linux) with this process however
    it ends; after a SIGKILL of this one, those that user code has started itself may stay.
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
        self._make = partial(_Worker, pickle.dumps((build, args, memory_gb)), timeout_s)
        self._workers: set[_Worker] = {self._make() for _ in range(workers)}
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        # Its threads live until `close`: the kernel ends a process with the thread that has started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="killable")
        self._closed = False

    async def start(self) -> None:
        """Start the processes. Raises what `build` raises, RewardCrash when a process dies of it."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.gather(*(loop.run_in_executor(self._threads, worker.start) for worker in self._workers))
        except BaseException:
            await self.close()
            raise
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def call(self, *args: Any) -> T:
        """What the function returns. Time spent waiting for a free process is free; a cancelled call is killed.

        A call whose process gets a SIGKILL that is not ours is made once more. Raises RewardTimeout, RewardCrash when
        the process dies, and what the function raises, with the traceback as a note: a RewardError, or a RewardError
        that tells of it.
        """
        try:
            return await self._call(args)
        except _Killed:  # from outside, or for want of memory on the machine: once more, before user code is blamed
            return await self._call(args)

    async def _call(self, args: tuple[Any, ...]) -> T:
        worker = await self._idle.get()
        if self._closed:
            self._idle.put_nowait(worker)  # for the next who waits
            raise RewardCrash("the reward processes are closed")
        running = asyncio.get_running_loop().run_in_executor(self._threads, worker.call, args)
        running.add_done_callback(partial(self._give_back, worker))
        try:
            with span("score"):
                return await asyncio.shield(running)
        except asyncio.CancelledError:
            if not running.done():  # else the next call may have it by now
                worker.kill()
            raise

    async def close(self) -> None:
        """Kill the processes; calls under way or waiting raise RewardCrash."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        await asyncio.to_thread(self._threads.shutdown)
        for worker in self._workers:
            worker.clean_up()

    def _give_back(self, worker: _Worker, call: asyncio.Future[T]) -> None:
        if not call.cancelled():
            call.exception()  # of a call that was cancelled nobody else asks, and asyncio would complain
        if worker.killed and not self._closed:
            self._workers.remove(worker)
            self._threads.submit(worker.clean_up)
            worker = self._make()  # started by its first call
            self._workers.add(worker)
        self._idle.put_nowait(worker)


class _Worker:
    """One process, begun when it is needed. `kill` may come from any thread; the other methods from one at a time."""

    def __init__(self, setup: bytes, timeout_s: float) -> None:
        self._setup, self._timeout_s = setup, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self.killed = False

    def start(self) -> None:
        """Raises what building the function raises."""
        self._pipe, theirs = Pipe()
        with theirs, self._lock:
            if self.killed:
                raise RewardCrash("its process was stopped")
            # -u: what user code prints is not lost when the process is killed
            command = [sys.executable, "-u", "-c", _COMMAND, f"{theirs.fileno()},{os.getpid()}", *sys.path]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
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
        except Exception as error:  # of a type that depends on what is in there
            raise RewardError(f"a problem that can't be sent to another process: {error}") from error
        if self._process is None or self._process.poll() is not None:  # new, or killed from outside while idle
            self.clean_up()
            self.start()
        try:
            return self._ask(request, self._timeout_s)
        except RewardMemory:
            self._end()  # it may still hold what it took
            raise

    def kill(self) -> None:
        """End the process for good, together with those it has started. Waits for nothing."""
        with self._lock, suppress(ProcessLookupError):
            self.killed = True
            if self._process is not None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def clean_up(self) -> None:
        """Forget a process that has ended."""
        if self._process is not None:
            self._process.wait()
            self._pipe.close()
            with self._lock:
                self._process = None

    def _ask(self, request: bytes, timeout_s: float) -> Any:
        """The answer. Raises the error that is the answer, RewardTimeout or RewardCrash."""
        deadline = time.monotonic() + timeout_s
        kind, doing = "doing", "a reward process"
        try:
            with self._killed_at(deadline) if len(request) > _SURELY_SENT else nullcontext():
                self._pipe.send_bytes(request)
            while kind == "doing" and self._pipe.poll(max(0.0, deadline - time.monotonic())):
                kind, value = self._pipe.recv()
                doing = value if kind == "doing" else doing
        except (EOFError, OSError) as error:
            if time.monotonic() < deadline:
                ours, code = self.killed, self._end(_DYING_S)  # the pipe closes a moment before the process ends
                kind_of_death = _Killed if code == -signal.SIGKILL and not ours else RewardCrash
                raise kind_of_death(f"{doing}: its process died with {_describe(code)}") from error
        if kind == "doing":
            self._end()
            raise RewardTimeout(f"{doing}: took longer than {timeout_s:g} s and was killed")
        if kind == "raised":
            raise value
        return value

    def _end(self, patience_s: float = 0.0) -> int:
        """Kill a process that has not ended by itself within `patience_s`; how it went, as subprocess tells it."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self.kill()
        code = self._process.wait()
        self.clean_up()
        return code

    @contextmanager
    def _killed_at(self, deadline: float) -> Iterator[None]:
        """End the process when the block takes so long: it may not read what is sent to it."""
        timer = Timer(deadline - time.monotonic(), self.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _Killed(RewardCrash):
    """By a signal that no code can send itself by accident."""


def _describe(code: int) -> str:
    return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
